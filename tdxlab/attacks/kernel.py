"""Attacks on KVM's own books: a stage with Linux on it, and a mirror that lies."""

from __future__ import annotations

from typing import Any

from tdxlab.abi import leaves as abi
from tdxlab.abi.status import is_error
from tdxlab.arch import PAGE_SHIFT
from tdxlab.attacks.stage import DATA, GUEST, HOST, SECRET, VICTIM_LP, Stage
from tdxlab.attacks.verdict import CONTROL, NOTHING, SEPT, Verdict, said
from tdxlab.kvm.roots import KVM_MIRROR_ROOTS, for_each_tdp_mmu_root
from tdxlab.kvm.spte import SHADOW_NONPRESENT_VALUE
from tdxlab.kvm.tdp_iter import TdpIter
from tdxlab.machine import Machine
from tdxlab.memory import LINE_SIZE

_GFN = 1


class KernelStage(Stage):
    """A stage on which KVM runs the victim; parameters as for `Stage`.

    td: the victim, with the secret at GPA 0x1000; it runs only while KVM runs it.
    """

    def make_machine(self, encrypted: bool) -> Machine:
        """A machine on which Linux has booted."""
        machine = Machine(gpaw=self.gpaw, memory="1 GiB", encrypted=encrypted)
        self.host = machine.host
        self.td = machine.create_td(memory="64 KiB", sept_ve_disable=False)
        return machine

    def set_up(self) -> None:
        """Let the victim write its secret."""
        self.data_gpa = _GFN << PAGE_SHIFT
        self.td.write(self.data_gpa, DATA)
        self.keyid, self.tdr = self.td.tdx.hkid, self.td.tdx.td.tdr
        self.data_hpa = self.mirror_entry().old_spte & self.machine.memory.page_mask
        self.spare = [self.host.pages.alloc_page("the host's own")]

    def _reads_on(self) -> bool:
        return bool(self.td.read(self.data_gpa, LINE_SIZE).ok)

    def mirror_entry(self) -> TdpIter:
        """Where KVM's mirror has its entry for the data page."""
        root = next(for_each_tdp_mmu_root(self.td.vm, KVM_MIRROR_ROOTS))
        entry = TdpIter(self.td.vm, root, 1, _GFN, 0)
        entry.descend(1)
        return entry

    def write_mirror(self, name: str, spte: int) -> None:
        """The host's kernel writes an entry of its mirror, past all of KVM's rules."""
        word, memory = self.mirror_entry().word, self.machine.memory
        self.tape.move(HOST, name, lambda: memory.words.put(word, spte), {"spte": spte})

    def run_read(self) -> Any:
        """KVM runs the victim, which reads its secret."""
        return self.tape.move(
            GUEST,
            "read memory",
            lambda: self.td.read(self.data_gpa, LINE_SIZE).value,
            {"gpa": self.data_gpa},
            lp=VICTIM_LP,
        )


def corrupt_mirror(stage: KernelStage) -> Verdict:
    """In KVM's mirror, let the entry for the victim's page lead to another page, then to none; map
    another page there, and let the victim read.
    """
    spte = stage.mirror_entry().old_spte
    other = spte & ~stage.machine.memory.page_mask | stage.spare[0]
    stage.write_mirror("let the mirror lead elsewhere", other)
    found = [stage.run_read()]
    stage.write_mirror("clear the mirror entry", SHADOW_NONPRESENT_VALUE)
    tdr, hpa = stage.tdr, stage.spare[0]
    status = stage.seamcall(abi.TDH_MEM_PAGE_AUG, rcx=stage.data_gpa, rdx=tdr, r8=hpa)
    found.append(stage.run_read())
    if is_error(status) and found == [SECRET, SECRET]:
        why = f"no CPU walks the mirror; the module has its own: {said(status)}"
        return Verdict(SEPT, NOTHING, why)
    return Verdict("", CONTROL, "the victim reads what the mirror says")
