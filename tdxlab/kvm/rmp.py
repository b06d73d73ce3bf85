"""SNP's back end: a table that says, for each page of RAM, which guest it belongs to.

The CPU looks into this reverse map (RMP) after each nested walk. KVM fills it as guest_memfd
prepares and frees pages, and not as they are mapped: a mapping can go and come back without any
call, and there is no mirror, since the nested page table is KVM's own.

    page of RAM        RMP entry
    the host's         none                         a shared access may reach it
    a guest's          its ASID, and the gfn        a private access of that guest at that gfn may

Source: Linux 6.16, arch/x86/kvm/svm/sev.c (sev_gmem_prepare, sev_gmem_invalidate,
snp_launch_finish), svm/svm.c (npf_interception).
Differs: an RMP in little. Entries are of 4 KiB; whether the guest has validated a page, permission
levels, and what RMPUPDATE can refuse are left out. The nested page table has the format of an EPT,
and memory is not encrypted. Nothing is measured at the launch.
"""

from __future__ import annotations

from typing import NamedTuple

from tdxlab.journal import Field, Fields, Journal, Journalled, Table
from tdxlab.kvm.vm import Vm

#: Bit of a nested page fault's error code: the guest's page tables have the C-bit there. KVM makes
#: PFERR_PRIVATE_ACCESS of it. Source: asm/kvm_host.h, PFERR_GUEST_ENC_MASK.
PFERR_GUEST_ENC_MASK = 1 << 34
#: Exit reason of a nested page fault. Source: uapi/asm/svm.h.
SVM_EXIT_NPF = 0x400


class RmpEntry(NamedTuple):
    """A page that is assigned. asid: the number by which the CPU tells guests apart."""

    asid: int
    gfn: int


class Rmp(Journalled):
    """The RMP of one machine.

    made_private, made_shared: entries changed so far, in 4 KiB.
    """

    made_private = Field(0)
    made_shared = Field(0)
    _asids = Field(0)

    def __init__(self, journal: Journal) -> None:
        self.fields = Fields(journal, self)
        self._entries = Table(journal)

    def new_asid(self) -> int:
        """A number for another guest. Differs: the first free one, never used twice."""
        self._asids += 1
        return self._asids

    def lookup(self, pfn: int) -> RmpEntry | None:
        """Whose page it is; None for the host's. Source: snp_lookup_rmpentry."""
        entry: RmpEntry | None = self._entries.get(pfn)
        return entry

    def make_private(self, pfn: int, gfn: int, asid: int) -> None:
        """Assign a page of the host's to a guest. Source: rmp_make_private."""
        self._entries.put(pfn, RmpEntry(asid, gfn))
        self.made_private += 1

    def make_shared(self, pfn: int) -> None:
        """Give an assigned page back to the host. Source: rmp_make_shared."""
        self._entries.drop(pfn)
        self.made_shared += 1

    def entries(self, asid: int) -> dict[int, int]:
        """pfn -> gfn of all pages of one guest, by ascending pfn."""
        found = sorted(self._entries.items())
        return {pfn: entry.gfn for pfn, entry in found if entry.asid == asid}

    def allows(self, pfn: int, asid: int, gfn: int, *, encrypted: bool) -> bool:
        """What the CPU checks after a walk: an access with the C-bit needs a page that is this
        guest's at this gfn, one without it needs a page of the host's.
        """
        return self.lookup(pfn) == (RmpEntry(asid, gfn) if encrypted else None)


class SnpGmem:
    """The hooks of an SNP VM's guest_memfd. rmp: of the machine. asid: of the VM."""

    def __init__(self, rmp: Rmp) -> None:
        self.rmp = rmp
        self.asid = rmp.new_asid()

    def prepare(self, gfn: int, pfn: int) -> int:
        """Assign the page, if it is not assigned yet. Returns 0. Source: sev_gmem_prepare."""
        if self.rmp.lookup(pfn) is None:
            self.rmp.make_private(pfn, gfn, self.asid)
        return 0

    def invalidate(self, pfn: int) -> None:
        """Take the page back, if it is assigned. Source: sev_gmem_invalidate."""
        if self.rmp.lookup(pfn) is not None:
            self.rmp.make_shared(pfn)


def snp_launch_finish(vm: Vm) -> None:
    """KVM_SEV_SNP_LAUNCH_FINISH: private memory can be mapped ahead from now on."""
    vm.pre_fault_allowed = True
