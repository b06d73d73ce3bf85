"""vCPUs fault, run and are kicked while another thread converts their memory, in many orders."""

from collections import Counter
from collections.abc import Generator
from typing import Any

import pytest
from td_scene import TdScene, boot

from tdxlab.abi.registers import Registers
from tdxlab.kvm.exits import KvmExit, MemoryFaultExit
from tdxlab.kvm.host import Doing
from tdxlab.kvm.set_attributes import kvm_vm_set_mem_attributes
from tdxlab.kvm.tdx_run import kvm_vcpu_ioctl_run
from tdxlab.kvm.vm import Vcpu
from tdxlab.seam import sept
from tdxlab.seam.td import Tdcs
from tdxlab.steps import Operation, Step, run, seeded

GFNS = list(range(0x1FE, 0x206))
ROUNDS = 6


def guests(td: TdScene, lists: dict[int, list[int]]) -> None:
    """Each vCPU accepts the gfns of its list, one after the other, then waits for a signal."""

    def run_guest(vcpu: Vcpu, lp: int) -> Doing:
        todo = lists[vcpu.vcpu_id]
        while lp not in td.host.exits:
            yield ("guest", lp, len(todo))
            if not td.machine.cpu.vcpu_inside(lp):
                continue
            if not todo:
                vcpu.signal_pending = True
                td.host.take_out(lp)
            else:
                registers = Registers(rcx=todo[0] << 12)
                outcome = td.machine.tdcall(lp, 6, registers)
                if outcome.exited:
                    td.host.deliver_exit(lp, outcome)
                else:
                    todo.pop(0)

    td.host.run_guest = run_guest  # type: ignore[method-assign]


def vcpu_thread(td: TdScene, number: int) -> Generator[Step, None, KvmExit]:
    """KVM_RUN; user space converts to private whatever the guest wants private."""
    while True:
        result: KvmExit = yield from kvm_vcpu_ioctl_run(td.vcpus[number])
        if not isinstance(result, MemoryFaultExit):
            return result
        gfn = result.gpa >> 12
        yield from kvm_vm_set_mem_attributes(td.vm, gfn, gfn + 1, True)


def converter(td: TdScene, rounds: int) -> Operation:
    """Converts all the memory to shared and back."""
    for _ in range(rounds):
        yield from kvm_vm_set_mem_attributes(td.vm, GFNS[0], GFNS[-1] + 1, False)
        yield from kvm_vm_set_mem_attributes(td.vm, GFNS[0], GFNS[-1] + 1, True)


def septes(td: TdScene) -> dict[int, int]:
    """gfn -> pfn of every page in the Secure EPT; the bench looks where KVM cannot."""
    memory = td.machine.memory
    page = memory.frame(td.tdx.td.tdcs[0])
    eptp = memory.words.view[page + Tdcs.EPTP]
    found = {}
    for gfn in GFNS:
        entry = sept.walk(memory, eptp, gfn << 12, 0)
        folio = td.gmem.folio(td.files[0], gfn)
        if folio is not None and entry.septe & memory.page_mask == folio.pfn << 12:
            found[gfn] = folio.pfn
    return found


@pytest.mark.parametrize("seed", range(30))
def test_faults_and_conversions_in_any_order_keep_the_vm_alive(seed: int) -> None:
    td = TdScene(boot(lps=4, packages=2), vcpus=3)
    td.finalize()
    td.fault_in(GFNS)
    lists = dict.fromkeys(range(3), GFNS * ROUNDS)
    guests(td, lists)
    threads: list[Any] = [td.host.on_cpu(n, vcpu_thread(td, n)) for n in range(3)]
    schedule = seeded([*threads, td.host.on_cpu(3, converter(td, ROUNDS))], seed)
    assert td.vm.vm_bugged == ""
    assert td.machine.module.halted is None
    assert all(not todo for todo in lists.values())
    assert schedule.results[3] is None
    assert td.host.ipis == {}
    assert td.tdx.wait_for_sept_zap is False
    mapped = septes(td)
    folios = td.gmem.pages(td.files[0]).values()
    references = {f.pfn: n for f in folios if (n := td.gmem.page_refs.view[f.pfn])}
    assert references == Counter(mapped.values())
    assert sum(td.vm.stats[name] for name in ("pages_4k", "pages_2m", "pages_1g")) == len(mapped)
    td.destroy()
    assert td.host.pages.leaked == {}
    assert set(td.host.pages.in_use.values()) <= {"user memory"}


def test_a_zap_while_the_other_vcpu_is_between_mode_and_entry_waits_for_it() -> None:
    td = TdScene(boot(lps=4), vcpus=2)
    td.finalize()
    td.fault_in([GFNS[0]])
    guests(td, {0: [], 1: []})
    entering = td.host.on_cpu(1, kvm_vcpu_ioctl_run(td.vcpus[1]))
    while next(entering)[0] != "kvm_vcpu_exit_request":
        pass
    zapping = td.host.on_cpu(0, kvm_vm_set_mem_attributes(td.vm, GFNS[0], GFNS[0] + 1, False))
    while (step := next(zapping))[0] != "wait":
        pass
    assert step == ("wait", "IPI", 1)
    while td.vcpus[1].cpu in td.host.ipis:
        next(entering)
    assert run(zapping) == 0
    assert td.vcpus[1].exit_reason == 1
    run(entering)
    assert td.vm.vm_bugged == ""
