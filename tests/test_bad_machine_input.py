"""Mistakes at the machine with Linux: the errno or ValueError of the real interface, in words, and
a machine that did not change.
"""

import errno
from collections.abc import Callable
from typing import Any

import pytest

from tdxlab.arch import PAGE_SIZE, SIZE_1G, SIZE_2M
from tdxlab.guest import MapGpa, Read, Write
from tdxlab.kvm.params import KVM_X86_DEFAULT_VM, KVM_X86_TDX_VM
from tdxlab.kvm.slots import KVM_MEM_GUEST_MEMFD, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY
from tdxlab.machine import Machine
from tdxlab.vmm_errors import IoctlError
from tdxlab.vmm_run import ERROR, MEMORY_FAULT
from tdxlab.vmm_td import Td

MEMORY = 4 << 20
SHARED = 1 << 47


class Scene:
    """One machine: two TDs that run, one that is dead, one that is gone, a plain VM."""

    def __init__(self) -> None:
        self.machine = Machine(memory="1 GiB")
        self.td, self.other = (self.machine.create_td(memory=MEMORY) for _ in range(2))
        self.td.touch(0)
        self.dead = self.machine.create_td(memory=MEMORY, accepts=False)
        self.dead.touch(0)
        self.gone = self.machine.create_td(memory=MEMORY)
        self.gone.destroy()
        self.plain = self.machine.create_vm(memory=MEMORY)


@pytest.fixture(scope="module")
def scene() -> Scene:
    return Scene()


def region(td: Td, gpa: int, size: int | str, slot: int = 7, **more: Any) -> None:
    td.set_user_memory_region(slot, gpa, size, **more)


def _any(value: Any) -> Any:
    """`value`, of which mypy shall not say that it is wrong."""
    return value


Mistake = Callable[[Scene], object]

#: What a user does wrong, the errno (None: the library refuses before KVM is asked), and words of
#: the complaint.
MISTAKES: dict[str, tuple[Mistake, int | None, tuple[str, ...]]] = {
    "GPAW 50": (lambda s: Machine(gpaw=50), None, ("50", "48 or 52")),
    "TD of GPAW 57": (lambda s: s.machine.create_td(gpaw=57), None, ("57", "48 or 52")),
    "memory of half a GiB": (lambda s: Machine(memory="512 MiB"), None, ("512 MiB", "1 GiB")),
    "memory in words": (lambda s: Machine(memory="lots"), None, ("'lots'", "64 MiB")),
    "257 LPs": (lambda s: Machine(lps=257), None, ("257", "1..256")),
    "9 packages": (lambda s: Machine(lps=9, packages=9), None, ("9 packages", "1..8")),
    "guest memory of 100 bytes": (
        lambda s: s.machine.create_td(memory=100),
        None,
        ("0x64", "multiple of 0x1000"),
    ),
    "guest memory above the shared bit": (
        lambda s: s.machine.create_td(memory=1 << 48),
        None,
        ("128 TiB", "GPAW 48"),
    ),
    "no vCPU": (lambda s: s.machine.create_td(vcpus=0), None, ("0 vCPUs", "1 to 4")),
    "more vCPUs than LPs": (
        lambda s: s.machine.create_td(vcpus=5),
        None,
        ("5 vCPUs", "1 to 4", "LPs"),
    ),
    "TD as a plain VM": (
        lambda s: s.machine.create_vm(vm_type=KVM_X86_TDX_VM),
        None,
        ("VM type 5", "create_td"),
    ),
    # -- things of the wrong kind
    "GPAW in quotes": (lambda s: Machine(gpaw=_any("48")), None, ("gpaw is '48'", "give an int")),
    "vCPUs in quotes": (
        lambda s: s.machine.create_td(vcpus=_any("2")),
        None,
        ("vcpus is '2'", "give an int"),
    ),
    "GPA in quotes": (lambda s: s.td.touch(_any("0x1000")), None, ("gpa is '0x1000'", "an int")),
    "half a GPA": (lambda s: s.td.run([Read(_any(0.5))]), None, ("gpa is 0.5", "an int")),
    "words as a size": (lambda s: s.td.run([Read(0, _any("8"))]), None, ("size is '8'", "an int")),
    "half a GPA to convert": (
        lambda s: s.td.run([MapGpa(_any(1.5), PAGE_SIZE)]),
        None,
        ("gpa is 1.5", "give an int"),
    ),
    "text to store": (
        lambda s: s.td.run([Write(0, _any("x"))]),
        None,
        ("data is 'x'", "give bytes"),
    ),
    "text to write": (lambda s: s.td.write(0, _any("hello")), None, ("data is 'hello'", "bytes")),
    "LP in quotes": (lambda s: s.td.run([Read(0)], lp=_any("0")), None, ("lp is '0'", "an int")),
    "conversion to 1": (
        lambda s: s.td.convert(0, PAGE_SIZE, to=_any(1)),
        None,
        ("to is 1", "give a str"),
    ),
    "attributes that are neither": (
        lambda s: s.td.set_memory_attributes(0, PAGE_SIZE, private=_any("yes")),
        None,
        ("private is 'yes'", "True or False"),
    ),
    "program of words": (lambda s: s.td.run(_any("read")), None, ("'r' is no access",)),
    "tables of a number": (lambda s: s.machine.tables(_any(3)), None, ("vm is 3",)),
    # -- memslots
    "overlapping slot": (
        lambda s: region(s.td, MEMORY - PAGE_SIZE, SIZE_2M),
        errno.EEXIST,
        ("overlap slot 0", hex(MEMORY - 1), "delete that slot"),
    ),
    "slot at half a page": (
        lambda s: region(s.td, MEMORY + 0x800, SIZE_2M),
        errno.EINVAL,
        ("GPA", hex(MEMORY + 0x800), f"did you mean {MEMORY:#x}"),
    ),
    "slot of half a page": (
        lambda s: region(s.td, MEMORY, 0x800),
        errno.EINVAL,
        ("size 0x800", "multiple of 0x1000"),
    ),
    "slot of 8 TiB": (
        lambda s: region(s.td, MEMORY, "8 TiB"),
        errno.EINVAL,
        (hex(8 << 40), f"at most {(8 << 40) - PAGE_SIZE:#x}", "use several"),
    ),
    "slot above all HVAs": (
        lambda s: region(s.td, MEMORY, SIZE_2M, hva=(1 << 56) - SIZE_2M),
        errno.EINVAL,
        (hex((1 << 56) - SIZE_2M), hex((1 << 56) - PAGE_SIZE)),
    ),
    "read-only flag of a slot that is there": (
        lambda s: s.plain.set_user_memory_region(0, 0, MEMORY, flags=KVM_MEM_READONLY),
        errno.EINVAL,
        ("slot 0 cannot become that", "delete it"),
    ),
    "slot below all HVAs": (
        lambda s: region(s.td, MEMORY, PAGE_SIZE, hva=-PAGE_SIZE),
        errno.EINVAL,
        ("HVAs from -0x1000 on",),
    ),
    "slot in an address space that a TD does not have": (
        lambda s: region(s.td, MEMORY, PAGE_SIZE, slot=1 << 16 | 3),
        errno.EINVAL,
        ("slot 0x10003", "address space 1", "this VM has 1"),
    ),
    "private memory below GPA 0": (
        lambda s: s.td.set_memory_attributes(-PAGE_SIZE, PAGE_SIZE, private=True),
        errno.EINVAL,
        ("GPA -0x1000", "from 0 on"),
    ),
    "a negative number of vCPUs": (
        lambda s: s.machine.create_vm(vcpus=-1),
        None,
        ("-1 vCPUs", "0 to 1024"),
    ),
    "tables of a TD of another machine": (
        lambda s: Machine(memory="1 GiB").tables(s.td),
        None,
        ("TD 1", "another machine"),
    ),
    "slot at an odd HVA": (
        lambda s: region(s.td, MEMORY, PAGE_SIZE, hva=0x1001),
        errno.EINVAL,
        ("HVA 0x1001",),
    ),
    "slot with the shared bit": (
        lambda s: region(s.td, SHARED, SIZE_2M),
        errno.EINVAL,
        (hex(SHARED), f"0..{SHARED - 1:#x}", "SHARED bit"),
    ),
    "slot over the shared bit": (
        lambda s: region(s.td, SHARED - PAGE_SIZE, SIZE_2M),
        errno.EINVAL,
        ("SHARED bit",),
    ),
    "slot beyond the host's addresses": (
        lambda s: s.plain.set_user_memory_region(7, 1 << 52, SIZE_2M),
        errno.EINVAL,
        (hex(1 << 52), f"0..{(1 << 52) - 1:#x}"),
    ),
    "slot number 40000": (
        lambda s: region(s.td, MEMORY, PAGE_SIZE, slot=40000),
        errno.EINVAL,
        ("slot 40000", "0..32763"),
    ),
    "read-only slot of a TD": (
        lambda s: region(s.td, MEMORY, PAGE_SIZE, flags=KVM_MEM_READONLY),
        errno.EINVAL,
        ("type TDX", "flags 0x2"),
    ),
    "dirty log of private memory": (
        lambda s: region(
            s.td, MEMORY, PAGE_SIZE, flags=KVM_MEM_GUEST_MEMFD | KVM_MEM_LOG_DIRTY_PAGES
        ),
        errno.EINVAL,
        ("type TDX", "flags 0x5"),
    ),
    "slot that is there, larger": (
        lambda s: region(s.td, 0, 2 * MEMORY, slot=0),
        errno.EINVAL,
        ("slot 0 exists", "size 0"),
    ),
    "deleting no slot": (lambda s: region(s.td, 0, 0), errno.EINVAL, ("no slot 7 to delete",)),
    "slot without its guest_memfd": (
        lambda s: region(s.td, MEMORY, PAGE_SIZE, flags=KVM_MEM_GUEST_MEMFD, gmem=9),
        errno.EBADF,
        ("guest_memfd 9", "no such file"),
    ),
    "slot over a used part of a guest_memfd": (
        lambda s: region(s.td, MEMORY, PAGE_SIZE, flags=KVM_MEM_GUEST_MEMFD, gmem=0),
        errno.EINVAL,
        ("guest_memfd 0", "another slot has that part"),
    ),
    # -- attributes and conversions
    "attributes of half a page": (
        lambda s: s.td.set_memory_attributes(0x800, PAGE_SIZE, private=True),
        errno.EINVAL,
        ("GPA 0x800", "did you mean 0x0"),
    ),
    "attributes of a plain VM": (
        lambda s: s.plain.set_memory_attributes(0, PAGE_SIZE, private=True),
        errno.EINVAL,
        ("type DEFAULT has no private memory",),
    ),
    "conversion of a plain VM": (
        lambda s: s.plain.convert(0, PAGE_SIZE, to="private"),
        errno.EINVAL,
        ("type DEFAULT has no private memory",),
    ),
    "conversion at half a page": (
        lambda s: s.td.convert(0x800, PAGE_SIZE, to="shared"),
        None,
        ("0x800", "multiples of 0x1000"),
    ),
    "conversion of half a page": (
        lambda s: s.td.convert(0, 0x800, to="shared"),
        None,
        ("0x800", "multiples of 0x1000"),
    ),
    "conversion with the shared bit": (
        lambda s: s.td.convert(SHARED, PAGE_SIZE, to="shared"),
        None,
        ("SHARED bit", "give 0x0"),
    ),
    "conversion to something": (
        lambda s: s.td.convert(0, PAGE_SIZE, to="public"),
        None,
        ("'public'", "'shared' or 'private'"),
    ),
    "conversion of nothing": (
        lambda s: s.td.convert(MEMORY, PAGE_SIZE, to="shared"),
        None,
        ("have no memory", f"0x0..{MEMORY - 1:#x}"),
    ),
    "punching half a page": (
        lambda s: s.td.punch_hole(0x800, PAGE_SIZE),
        errno.EINVAL,
        ("offset 0x800",),
    ),
    "punching nothing": (
        lambda s: s.td.punch_hole(MEMORY, PAGE_SIZE),
        None,
        ("no guest_memfd", f"0x0..{MEMORY - 1:#x}"),
    ),
    # -- vCPUs and programs
    "vCPU 1 of 1": (lambda s: s.td.touch(0, vcpu=1), None, ("no vCPU 1", "it has 0")),
    "vCPU of another TD": (
        lambda s: s.td.touch(0, vcpu=s.other.vcpu(0)),
        None,
        ("vCPU 0 of TD 2", "cannot run TD 1"),
    ),
    "LP 4 of 4": (lambda s: s.td.run([Read(0)], lp=4), None, ("LP 4", "LPs 0..3")),
    "access beyond 48 bits": (lambda s: s.td.touch(1 << 48), None, (hex(1 << 48), "48 bits")),
    "access across 48 bits": (lambda s: s.td.read((1 << 48) - 1, 2), None, ("48 bits",)),
    "negative access": (lambda s: s.td.run([Write(-8)]), None, ("-0x8", "48 bits")),
    "endless touch": (
        lambda s: s.td.touch(0, "128 TiB"),
        None,
        ("128 TiB in one go", "64 GiB"),
    ),
    "endless read": (lambda s: s.td.read(0, 1 << 46), None, ("64 TiB in one go", "1 GiB")),
    "empty read": (lambda s: s.td.read(0, 0), None, ("0 bytes", "at least 1")),
    "shared memory of nothing": (
        lambda s: s.td.read_shared(MEMORY, 8),
        None,
        ("no memory", f"0x0..{MEMORY - 1:#x}"),
    ),
    # -- life
    "launching twice": (lambda s: s.td.finalize(), errno.EINVAL, ("finalized already",)),
    "initialising twice": (lambda s: s.td.init_vm(), errno.EINVAL, ("initialised already",)),
    "vCPU after the launch": (
        lambda s: s.td.add_vcpu(),
        errno.EIO,
        ("between KVM_TDX_INIT_VM and KVM_TDX_FINALIZE_VM",),
    ),
    "using a dead TD": (lambda s: s.dead.touch(0), errno.EIO, ("TD 3 is dead", "destroy it")),
    "converting a dead TD's memory": (
        lambda s: s.dead.set_memory_attributes(0, PAGE_SIZE, private=False),
        errno.EIO,
        ("TD 3 is dead",),
    ),
    "destroying twice": (lambda s: s.gone.destroy(), errno.EBADF, ("TD 4 was destroyed already",)),
    "using a destroyed TD": (lambda s: s.gone.touch(0), errno.EBADF, ("TD 4 was destroyed",)),
    "memory for a destroyed TD": (
        lambda s: s.gone.add_memory(SIZE_1G, SIZE_2M),
        errno.EBADF,
        ("TD 4 was destroyed",),
    ),
}


@pytest.mark.parametrize(("mistake", "error", "words"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_explained_and_changes_nothing(
    scene: Scene, mistake: Mistake, error: int | None, words: tuple[str, ...]
) -> None:
    before = scene.machine.digest()
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        mistake(scene)
    assert [word for word in words if word not in str(caught.value)] == []
    assert getattr(caught.value, "errno", None) == error
    assert isinstance(caught.value, IoctlError) == (error is not None)
    assert scene.machine.digest() == before


def test_a_td_without_a_keyid_is_refused_and_nothing_remains() -> None:
    machine = Machine(memory="1 GiB")
    for _ in range(31):
        machine.create_td(memory=PAGE_SIZE)
    before = machine.digest()
    with pytest.raises(IoctlError, match="ENOSPC: every private KeyID belongs to a TD; destroy"):
        machine.create_td(memory=PAGE_SIZE)
    assert machine.digest() == before


def test_a_private_attribute_without_guest_memfd_is_accepted_and_the_fault_fails() -> None:
    td = Machine(memory="1 GiB").create_td(memory=MEMORY)
    td.add_memory(SIZE_1G, SIZE_2M, private=False)
    td.set_memory_attributes(SIZE_1G, SIZE_2M, private=True)
    result = td.touch(SIZE_1G)
    assert result.reason == MEMORY_FAULT
    assert "private already" in result.detail
    td.set_memory_attributes(SIZE_1G, SIZE_2M, private=False)
    td.write(SIZE_1G | SHARED, b"works")
    assert td.read_shared(SIZE_1G, 5) == b"works"


def test_a_private_attribute_outside_all_slots_is_accepted() -> None:
    td = Machine(memory="1 GiB").create_td(memory=MEMORY)
    td.set_memory_attributes(SIZE_1G, SIZE_1G, private=True)
    assert td.vm.attributes.is_private(SIZE_1G >> 12)


def test_a_td_that_dies_can_still_be_destroyed() -> None:
    machine = Machine(memory="1 GiB")
    free = machine.host.pages.free
    td = machine.create_td(memory=MEMORY, accepts=False)
    assert td.touch(0).reason == ERROR
    td.destroy()
    assert machine.host.pages.free == free


def test_a_mistake_in_a_generator_comes_out_with_the_vcpu_outside() -> None:
    td = Machine(memory="1 GiB").create_td(memory=MEMORY)

    def program() -> Any:
        yield Write(0, b"x")
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        td.run(program())
    assert td.read(0, 1).value == b"x"


def test_a_td_runs_only_after_the_launch_and_takes_no_image_after_it() -> None:
    td = Machine(memory="1 GiB").create_td(memory=MEMORY, launch=False)
    result = td.touch(0)
    assert (result.reason, result.error) == (ERROR, -errno.EINVAL)
    td.add_image(0, b"first")
    with pytest.raises(IoctlError, match="EEXIST: a page there has its content already"):
        td.add_image(0, b"again")
    td.finalize()
    with pytest.raises(IoctlError, match="KVM_TDX_INIT_MEM_REGION: EINVAL: the TD is finalized"):
        td.add_image(PAGE_SIZE, b"late")
    assert td.read(0, 5).value == b"first"


def test_unknown_vm_types_are_named() -> None:
    machine = Machine(memory="1 GiB")
    assert machine.create_vm(vm_type=KVM_X86_DEFAULT_VM).touch(0).ok
    with pytest.raises(ValueError, match="VM type 9; choose"):
        machine.create_vm(vm_type=9)
