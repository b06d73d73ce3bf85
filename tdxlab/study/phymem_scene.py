"""A TD on the brink of its end: what the experiments on the PHYMEM calls begin with.

The module's own lock words and life cycle decide; everything that an experiment does is taken back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tdxlab import views
from tdxlab.abi import leaves as abi
from tdxlab.abi.registers import Registers
from tdxlab.host import Host
from tdxlab.host_td import HostTd
from tdxlab.scenarios import booted_machine

GPA = 0x4000_0000


class PhymemScene:
    """A machine with a TD that has run: one private page has just been removed, and its lines are
    not yet written back.

    values: the numbers that a caller has at hand, by name. lp: where the next call is made. calls:
    (leaf, RCX) of those made so far.
    """

    def __init__(self, *, gpaw: int = 48) -> None:
        self.machine = booted_machine()
        self.host = Host(self.machine)
        self.td = td = HostTd(self.host, gpaw=gpaw, max_vcpus=1)
        td.add_vcpu()
        page = td.add_page(GPA, b"a secret")
        td.finalize()
        self.host.must(0, abi.TDH_MEM_RANGE_BLOCK, rcx=GPA, rdx=td.tdr)
        self.host.must(0, abi.TDH_MEM_TRACK, rcx=td.tdr)
        self.host.must(0, abi.TDH_MEM_PAGE_REMOVE, rcx=GPA, rdx=td.tdr)
        self.values = {
            "private": page,
            "pfn": page >> 12,
            "keyed": self.keyed(td.keyid, page),
            "tdr": td.tdr,
            "tdcs": self.pages("PT_TDCX")[0],
            "td_hkid": td.keyid,
            "global_hkid": self.machine.platform.global_keyid,
            "gpa": GPA,
            "start": 0,
            "again": 1,
        }
        self.machine.cpu.conditions.interrupt_pending = True
        self.lp = 0
        self.calls: list[tuple[int, int]] = []

    def pages(self, *types: str) -> list[int]:
        """HPAs of the TD's pages of these types, ascending; of all types but the TDR's if none is
        given.
        """
        owned = [row for row in views.pamt_rows(self.machine) if row.owner == self.td.tdr]
        return sorted(row.hpa for row in owned if not types or row.page_type in types)

    def keyed(self, hkid: int, page: int) -> int:
        """mk_keyed_paddr: the KeyID above the address, whatever the numbers are.

        Source: Linux 6.16, asm/tdx.h.
        """
        return page | hkid << 52 - self.machine.platform.keyid_bits

    def seamcall(self, leaf: int, registers: Registers) -> int:
        """A call on the present LP; noted in `calls`."""
        self.calls.append((leaf, registers.rcx))
        return self.machine.seamcall(self.lp, leaf, registers)

    @contextmanager
    def undone(self) -> Iterator[None]:
        """What happens inside is taken back."""
        mark = self.machine.mark()
        self.calls = []
        try:
            yield
        finally:
            self.lp = 0
            self.machine.rewind(mark)
            self.machine.journal.release(mark)
