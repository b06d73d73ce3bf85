"""The root object: VMs on a machine with Linux, counts, tables, and the way back."""

import subprocess
import sys

import pytest

import tdxlab
from tdxlab.abi.registers import Registers
from tdxlab.arch import PAGE_SIZE, SIZE_1G, SIZE_2M
from tdxlab.bare import BareMachine
from tdxlab.kvm.params import KVM_X86_DEFAULT_VM, KVM_X86_SW_PROTECTED_VM
from tdxlab.machine import FIRMWARE_END, Machine
from tdxlab.views import mrtd


def tables_for(gfns: list[int], levels: int) -> int:
    """Secure EPT tables below the root for these frames: T(S)."""
    return sum(len({gfn >> 9 * k for gfn in gfns}) for k in range(1, levels))


def since(machine: Machine, before: dict[str, int]) -> dict[str, int]:
    """Calls that were made since `before`."""
    counts = {name: n - before.get(name, 0) for name, n in machine.seamcalls.items()}
    return {name: n for name, n in counts.items() if n}


def test_machine_is_exported_lazily() -> None:
    assert tdxlab.Machine is Machine
    code = "import sys, tdxlab; print('tdxlab.machine' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    with pytest.raises(AttributeError, match="no attribute 'Engine'"):
        _ = tdxlab.Engine


def test_machine_boots_with_the_module_ready() -> None:
    machine = Machine(memory="1 GiB", lps=3, packages=3)
    assert machine.module.is_ready
    assert machine.seamcalls["TDH.SYS.LP.INIT"] == 3
    assert machine.seamcalls["TDH.SYS.KEY.CONFIG"] == 3
    assert machine.seamcalls["TDH.MNG.CREATE"] == 0
    assert "TDH.MNG.CREATE" not in machine.seamcalls
    with pytest.raises(TypeError):
        machine.seamcalls["TDH.SYS.INIT"] = 0  # type: ignore[index]


@pytest.mark.parametrize(("gpaw", "levels"), [(48, 4), (52, 5)])
def test_touch_costs_what_the_set_of_pages_says(gpaw: int, levels: int) -> None:
    machine = Machine(gpaw=gpaw, memory=SIZE_1G)
    td = machine.create_td(vcpus=2, memory="5 MiB")
    before = dict(machine.seamcalls)
    assert td.touch(0, "5 MiB").ok
    pages = 5 * 256
    assert since(machine, before) == {
        "TDH.VP.ENTER": pages + 1,
        "TDH.VP.WR": 1,
        "TDH.MEM.PAGE.AUG": pages,
        "TDH.MEM.SEPT.ADD": tables_for(list(range(pages)), levels),
    }
    before = dict(machine.seamcalls)
    assert td.touch(0, "5 MiB", write=False).ok
    assert since(machine, before) == {"TDH.VP.ENTER": 1}


def test_tables_agree_in_mirror_and_external_tree() -> None:
    machine = Machine(memory="1 GiB")
    td = machine.create_td(memory="4 MiB")
    assert set(machine.tables(td)) == {"external"}
    td.touch(0x1000)
    td.touch(SIZE_2M, 3 * PAGE_SIZE)
    tables = machine.tables(td)
    assert tables["mirror"] == tables["external"]
    leaves = tables["external"]["4K"]
    assert (leaves.tables, leaves.entries) == (2, 4)
    assert leaves.as_dict() == {"tables": 2, "entries": 4, "capacity": 1024, "bytes": 8192}
    assert list(tables["mirror"]) == ["PML4", "1G", "2M", "4K"]
    td.convert(SIZE_2M, 2 * PAGE_SIZE, to="shared")
    td.touch(SIZE_2M, PAGE_SIZE)
    tables = machine.tables(td)
    assert tables["mirror"]["4K"].entries == tables["external"]["4K"].entries == 2
    assert tables["direct"]["4K"].entries == 1


def test_destroy_gives_every_page_and_the_keyid_back() -> None:
    machine = Machine(memory="1 GiB")
    free = machine.host.pages.free
    td = machine.create_td(vcpus=3, memory="4 MiB", image=b"firmware")
    td.touch(0, "4 MiB", vcpu=2)
    td.convert(0, "1 MiB", to="shared")
    td.touch(0, "1 MiB")
    keyid = td.keyid
    assert keyid in machine.host.hkids
    told: list[tuple[int, int]] = []
    td.destroy(progress=lambda done, total: told.append((done, total)))
    assert machine.host.pages.free == free
    assert dict(machine.host.pages.leaked) == {}
    assert td.keyid is None
    assert keyid not in machine.host.hkids
    assert machine.tables(td) == {}
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1][0] == told[-1][1]


def test_firmware_lies_below_4_gib_and_is_measured() -> None:
    machine = Machine(memory="1 GiB")
    plain = machine.create_td(memory="2 MiB")
    with_image = machine.create_td(memory="2 MiB", image=b"boot" * 2000)
    gpa = FIRMWARE_END - 2 * PAGE_SIZE
    assert with_image.read(gpa + 4096, 4).value == b"boot"
    assert plain.tdr is not None
    assert with_image.tdr is not None
    assert mrtd(machine, plain.tdr) != mrtd(machine, with_image.tdr)
    assert machine.seamcalls["TDH.MEM.PAGE.ADD"] == 2
    assert machine.seamcalls["TDH.MR.EXTEND"] == 32


def test_rewind_takes_everything_back_and_handles_work_on() -> None:
    machine = Machine(memory="1 GiB")
    td = machine.create_td(vcpus=2, memory="4 MiB")
    td.write(0x1000, b"before")
    digest, mark = machine.digest(), machine.mark()
    td.write(0x1000, b"after!")
    td.convert(0, SIZE_2M, to="shared")
    td.write(0x1000, b"shared")
    other = machine.create_td(memory="2 MiB")
    other.touch(0)
    td.destroy()
    machine.rewind(mark)
    assert machine.digest() == digest
    assert td.read(0x1000, 6).value == b"before"
    td.convert(0, SIZE_2M, to="shared")
    td.destroy()
    machine.rewind(mark)
    assert machine.digest() == digest


def test_two_machines_share_nothing() -> None:
    one, other = Machine(memory="1 GiB"), Machine(memory="1 GiB")
    digest = other.digest()
    one.create_td(memory="2 MiB").touch(0)
    assert other.digest() == digest
    assert "TDH.MNG.CREATE" not in other.seamcalls


def test_a_default_vm_runs_without_the_module() -> None:
    machine = Machine(memory="1 GiB")
    free, before = machine.host.pages.free, dict(machine.seamcalls)
    vm = machine.create_vm(vm_type=KVM_X86_DEFAULT_VM, vcpus=2, memory="4 MiB")
    assert vm.write(0x1FFC, b"across a page").ok
    assert vm.read(0x1FFC, 13, vcpu=1).value == b"across a page"
    assert vm.read_shared(0x2000, 4) == b"ss a"
    assert machine.tables(vm)["direct"]["4K"].entries == 2
    vm.destroy()
    assert since(machine, before) == {}
    assert machine.host.pages.free == free


def test_a_sw_protected_vm_has_two_memories_for_one_gpa() -> None:
    machine = Machine(memory="1 GiB")
    vm = machine.create_vm(vm_type=KVM_X86_SW_PROTECTED_VM, memory="4 MiB")
    vm.write(0x1000, b"private")
    vm.convert(0, SIZE_2M, to="shared")
    assert vm.read(0x1000, 7).value == bytes(7)
    vm.write(0x1000, b"shared!")
    vm.convert(0, SIZE_2M, to="private")
    assert vm.read(0x1000, 7).value == b"private"
    assert vm.read_shared(0x1000, 7) == b"shared!"


def test_a_write_sets_the_dirty_bit_and_a_read_the_accessed_bit() -> None:
    machine = Machine(memory="1 GiB")
    vm = machine.create_vm(memory="4 MiB")
    vm.read(0x1000, 1)
    root = vm.vm.sps[vm.vcpu(0).root_hpa]
    table = root.spt
    for level in (3, 2, 1):
        word = machine.memory.frame(table) + (0x1000 >> 12 + 9 * level & 511)
        table = machine.memory.words.view[word] & vm.vm.masks.address
    leaf = machine.memory.words.view[machine.memory.frame(table) + 1]
    assert leaf & 1 << 8
    vm.write(0x1000, b"x")
    leaf = machine.memory.words.view[machine.memory.frame(table) + 1]
    assert leaf & 1 << 9


def test_seamcalls_counts_leaves_that_do_not_exist_by_number() -> None:
    machine = BareMachine()
    machine.seamcall(0, 250, Registers())
    assert dict(machine.seamcalls) == {"leaf 250": 1}
    assert machine.seamcalls["TDH.MEM.TRACK"] == 0


def test_seamcalls_refuses_a_misspelt_name_and_counts_nothing_for_a_leaf_without_calls() -> None:
    machine = Machine(memory="1 GiB")
    assert machine.seamcalls["TDH.MEM.SEPT.RD"] == machine.seamcalls["leaf 250"] == 0
    with pytest.raises(KeyError, match=r"did you mean TDH\.MEM\.PAGE\.AUG"):
        machine.seamcalls["TDH.MEM.PAGE.AGU"]
