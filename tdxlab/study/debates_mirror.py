"""D16: whether to have a mirror at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from tdxlab.arch import PAGE_SIZE, SIZE_1G, SIZE_2M
from tdxlab.kvm import tdp_iter, tdp_mmu
from tdxlab.kvm.tdp_iter import TdpIter
from tdxlab.machine import Machine
from tdxlab.study.debate_tools import calls, many, substituted
from tdxlab.vmm_td import Td


class ReadRow(NamedTuple):
    """One deed. reads: mirror entries that KVM looks at. seamcalls: with the mirror; without: if
    each of the reads were a TDH.MEM.SEPT.RD. mirror_tables: pages of the mirror below its root at
    the end of the deed, for as many of the Secure EPT.
    """

    deed: str
    reads: int
    seamcalls: int
    without: int
    mirror_tables: int


def read_rows(gpaw: int) -> list[ReadRow]:
    """D16: some deeds, one after the other."""
    machine = Machine(gpaw=gpaw, memory="1 GiB", lps=1, packages=1)
    td = machine.create_td(memory=2 * SIZE_1G)
    td.touch(0)
    page = PAGE_SIZE
    deeds = {
        "first page of another GiB": lambda: td.touch(SIZE_1G),
        "the page beside it": lambda: td.touch(SIZE_1G + page),
        "7 more": lambda: td.touch(SIZE_1G + 2 * page, 7 * page),
        "2 MiB become shared, 9 mapped": lambda: td.convert(SIZE_1G, SIZE_2M, to="shared"),
        "2 MiB become shared, none mapped": lambda: td.convert(SIZE_2M, SIZE_2M, to="shared"),
    }
    return [_read_row(machine, td, name, deed) for name, deed in deeds.items()]


def _read_row(machine: Machine, td: Td, name: str, deed: Callable[[], object]) -> ReadRow:
    reads = 0

    class Counting(TdpIter):
        """An iterator that counts the entries of mirrors at which it looks."""

        __slots__ = ()

        def descend(self, goal: int) -> None:
            nonlocal reads
            level = self.level + (self.word < 0)
            super().descend(goal)
            reads += self.is_mirror * (level - self.level)

        def walk(self, end: int) -> Iterator[TdpIter]:
            nonlocal reads
            for it in super().walk(end):
                reads += self.is_mirror
                yield it

    before = calls(machine)
    with substituted([(tdp_iter, "TdpIter", Counting), (tdp_mmu, "TdpIter", Counting)]):
        deed()
    made, tables = calls(machine) - before, td.vm.stats["pt_pages_mirror"]
    return ReadRow(name, reads, made, made + reads, tables)


def judge_reads(rows: Sequence[ReadRow]) -> str:
    """D16 in words."""
    made, without = sum(row.seamcalls for row in rows), sum(row.without for row in rows)
    most = max(rows, key=lambda row: row.without - row.seamcalls)
    tables = max(row.mirror_tables for row in rows)
    more = "no SEAMCALL more" if without == made else f"{without - made} SEAMCALLs more"
    return (
        f"Without a mirror there would be {more}: {without} instead of {made}. Most is read when: "
        f"{most.deed} ({most.reads} entries). The mirror's price: {many(tables, 'page')} of tables "
        "below its root."
    )
