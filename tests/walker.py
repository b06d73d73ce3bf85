"""Somebody who walks about in a scene: draws a call that should succeed now, from what exists.

The makers of calls are in walker_calls.py; this is what they share.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from tdxlab.abi.registers import Registers
from tdxlab.seam.fields import Field
from tdxlab.seam.metadata import host_of
from tdxlab.seam.rules import SEPT_ACCEPTS, VCPU_READY
from tdxlab.seam.td import NO_LP, Td
from tests.scene import EntryView, Scene, TdView

#: Picks one of several options: hypothesis does, or a random generator.
Choose = Callable[[Sequence[Any]], Any]


class NothingToDo(Exception):
    """No call of the wanted leaf could succeed now."""


class HostCall(NamedTuple):
    """A SEAMCALL that is about to be made."""

    lp: int
    rax: int
    registers: Registers


class Walker:
    """A scene, and who chooses in it."""

    def __init__(self, scene: Scene, choose: Choose) -> None:
        self.scene = scene
        self.machine = scene.machine
        self.choose = choose

    def pick(self, options: Iterable[Any]) -> Any:
        """One of the options; NothingToDo if there is none."""
        some = list(options)
        if not some:
            raise NothingToDo
        return self.choose(some)

    def call(
        self, leaf: int, *, lp: int | None = None, version: int = 0, **operands: int
    ) -> HostCall:
        """A call on `lp`, None for any that runs the host."""
        lp = self.pick(self.scene.host_lps()) if lp is None else lp
        return HostCall(lp, leaf | version << 16, Registers(**operands))

    def free_page(self) -> int:
        return self.pick(self.scene.free_pages())

    def tds_for(self, leaf: int, *, exclusive: bool = False) -> list[TdView]:
        """TDs on which the leaf may work; exclusive: nobody holds the TDR."""
        return [td for td in self.scene.tds() if td.accepts(leaf, exclusive=exclusive)]

    def entries_for(
        self, leaf: int, lowest: int, highest: int, *, exclusive: bool = False
    ) -> list[tuple[TdView, EntryView]]:
        """(TD, S-EPT entry) on which the leaf may work."""
        return [
            (td, entry)
            for td in self.tds_for(leaf, exclusive=exclusive)
            for entry in td.entries(lowest, highest, SEPT_ACCEPTS[leaf])
        ]

    def vcpu_for(self, leaf: int) -> tuple[int, int]:
        """(TDVPR, LP) of a vCPU that is ready, and an LP where it may be used."""
        hosts = self.scene.host_lps()
        picked: tuple[int, int] = self.pick(
            (vcpu.tdvpr, lp)
            for vcpu in self.scene.vcpus()
            for lp in hosts
            if vcpu.td.accepts(leaf) and vcpu.state == VCPU_READY and vcpu.lp in (lp, NO_LP)
        )
        return picked

    def asker(self, td: TdView) -> int:
        """As whom the host looks at the fields of a TD."""
        mapped = Td(self.machine.memory, td.tdr)
        mapped.map_tdcs(self.machine.memory)
        return host_of(self.machine.module, mapped)

    def readable(self, rows: Sequence[Field], asker: int) -> Field:
        field: Field = self.pick(row for row in rows if row.read[asker])
        return field

    def writable(self, rows: Sequence[Field], asker: int) -> Field:
        field: Field = self.pick(row for row in rows if row.write[asker])
        return field
