"""The memory of the process that owns a VM: what stands behind HVAs, and may be taken away.

A page comes with its first use, zeroed. Before one goes, or moves, the MMU notifier has KVM unmap
it. Guest memory that is shared is this memory.

Source: Linux 6.16, mm/memory.c, mm/mmap.c, mm/migrate.c, as far as KVM sees them.
Differs: one process has one VM. A mapping has pages of one size, and is unmapped in whole pages.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import NamedTuple

from tdxlab.arch import PAGE_SHIFT, PAGE_SIZE
from tdxlab.journal import Field, Fields, Journalled, Table
from tdxlab.kvm.notifier import (
    kvm_mmu_notifier_invalidate_range_end,
    kvm_mmu_notifier_invalidate_range_start,
    kvm_mmu_notifier_release,
)
from tdxlab.kvm.pages import NO_PAGE, HostPages
from tdxlab.kvm.slots import HostPage
from tdxlab.kvm.vm import Vm, pages_per_level
from tdxlab.memory import ZERO_PAGE
from tdxlab.steps import Step

USE = "user memory"

Work = Generator[Step, None, None]


class Area(NamedTuple):
    """struct vm_area_struct: HVAs from start to end - 1, in pages of `level` (1 to 3)."""

    start: int
    end: int
    level: int
    writable: bool

    @property
    def page_size(self) -> int:
        """Bytes of one of its pages."""
        return pages_per_level(self.level) << PAGE_SHIFT


class ProcessMemory(Journalled):
    """The address space of the process that owns `vm`, its pages coming from `pages`."""

    areas: Field[tuple[Area, ...]] = Field(())

    def __init__(self, vm: Vm, pages: HostPages) -> None:
        self.vm = vm
        self.fields = Fields(vm.journal, self)
        self._host = pages
        #: HVA of a page's first byte -> its HPA
        self._pages = Table(vm.journal)

    # -- mapping

    def mmap(self, hva: int, size: int, *, level: int = 1, writable: bool = True) -> None:
        """Map `size` bytes of anonymous memory at `hva`, in pages of `level` (1 to 3). Nothing is
        allocated yet.

        Refuses what is not aligned to such pages, or mapped already: ValueError.
        """
        area = Area(hva, hva + size, level, writable)
        if level not in (1, 2, 3):
            raise ValueError(f"there are no host pages of level {level}; choose 1, 2 or 3")
        if size <= 0 or (hva | size) % area.page_size:
            raise ValueError(
                f"{size:#x} bytes at {hva:#x} are not whole pages of {area.page_size:#x} bytes; "
                "align both, or choose a lower level"
            )
        if any(old.start < area.end and area.start < old.end for old in self.areas):
            raise ValueError(f"something is mapped at {hva:#x} already; unmap it first")
        self.areas = (*self.areas, area)

    def munmap(self, hva: int, size: int) -> Work:
        """Unmap and free `size` bytes at `hva`; what is not mapped is passed over.

        Refuses to cut a large page: ValueError.
        """
        end = hva + size
        for area in self.areas:
            for cut in (hva, end):
                if area.start < cut < area.end and cut % area.page_size:
                    raise ValueError(
                        f"{cut:#x} lies inside a page of {area.page_size:#x} bytes; "
                        "unmap whole pages"
                    )
        yield from kvm_mmu_notifier_invalidate_range_start(self.vm, hva, end)
        yield ("unmap_page_range", hva, end)
        for page in self.resident(hva, end):
            self._free(page)
        self.areas = tuple(piece for area in self.areas for piece in _without(area, hva, end))
        yield from kvm_mmu_notifier_invalidate_range_end(self.vm, hva, end)

    def migrate(self, hva: int) -> Generator[Step, None, bool]:
        """Move the 4 KiB page at `hva` to another frame, content and all. False if it was not
        allocated, is large, or there is no free page.
        """
        page = hva & -PAGE_SIZE
        area = self.area(page)
        if area is None or area.level != 1 or page not in self._pages:
            return False
        target = self._host.alloc_page(USE)
        if target == NO_PAGE:
            return False
        yield from kvm_mmu_notifier_invalidate_range_start(self.vm, page, page + PAGE_SIZE)
        yield ("move_to_new_folio", page, target)
        memory = self.vm.memory
        memory.write_page(target, memory.read(self._pages[page], PAGE_SIZE), 0)
        self._free(page)
        self._pages.put(page, target)
        yield from kvm_mmu_notifier_invalidate_range_end(self.vm, page, page + PAGE_SIZE)
        return True

    def exit(self) -> Work:
        """The process ends: KVM lets go of all of it, then it is freed."""
        yield from kvm_mmu_notifier_release(self.vm)
        for page in list(self._pages):
            self._free(page)
        self.areas = ()

    def owned(self) -> list[int]:
        """HPA of each page that the process has, large ones too."""
        return list(self._pages.values())

    def resident(self, start: int, end: int) -> list[int]:
        """First HVAs in [start, end) of its pages, in the order in which they were allocated."""
        return [page for page in self._pages if start <= page < end]

    # -- what KVM asks

    def area(self, hva: int) -> Area | None:
        """The mapping that holds `hva`. Source: find_vma."""
        return next((area for area in self.areas if area.start <= hva < area.end), None)

    def fault_in(self, hva: int, *, write: bool) -> HostPage | None:
        """The 4 KiB at `hva`, allocated on first use; None where nothing is mapped, where a write
        is not allowed, or without memory.
        """
        area = self.area(hva)
        if area is None or (write and not area.writable):
            return None
        page = hva & -area.page_size
        if page not in self._pages and not self._allocate(page, area):
            return None
        hpa = self._pages[page] + hva - page
        return HostPage(hpa >> PAGE_SHIFT, area.writable, area.level)

    def mapping_level(self, hva: int) -> int:
        """Level at which `hva` is mapped at present; 1 if it is not. Source: mmu.c,
        host_pfn_mapping_level.
        """
        area = self.area(hva)
        if area is None or hva & -area.page_size not in self._pages:
            return 1
        return area.level

    # -- what the process itself does

    def write(self, hva: int, data: bytes) -> None:
        """Store bytes of one 4 KiB page. Refuses more, and where nothing is mapped: ValueError."""
        self.vm.memory.write(self._hpa(hva, len(data), write=True), data)

    def read(self, hva: int, size: int) -> bytes:
        """Bytes of one 4 KiB page. Refuses more, and where nothing is mapped: ValueError."""
        return self.vm.memory.read(self._hpa(hva, size, write=False), size)

    def _hpa(self, hva: int, size: int, *, write: bool) -> int:
        if hva % PAGE_SIZE + size > PAGE_SIZE:
            raise ValueError(
                f"{size:#x} bytes at {hva:#x} lie in more than one page of {PAGE_SIZE:#x} bytes; "
                "take one page after the other"
            )
        page = self.fault_in(hva, write=write)
        if page is None:
            raise ValueError(f"the process has no memory for this at {hva:#x}; mmap it first")
        return (page.pfn << PAGE_SHIFT) + hva % PAGE_SIZE

    def _allocate(self, page: int, area: Area) -> bool:
        if area.level == 1:
            hpa = self._host.alloc_page(USE)
        else:
            hpa = self._host.alloc_huge_page(area.page_size, USE)
        if hpa == NO_PAGE:
            return False
        for offset in range(0, area.page_size, PAGE_SIZE):
            self.vm.memory.write_page(hpa + offset, ZERO_PAGE, 0)
        self._pages.put(page, hpa)
        return True

    def _free(self, page: int) -> None:
        hpa = self._pages[page]
        self._pages.drop(page)
        if hpa in self._host.huge:
            self._host.free_huge_page(hpa)
        else:
            self._host.free_page(hpa)


def _without(area: Area, start: int, end: int) -> list[Area]:
    """What is left of an area without [start, end)."""
    pieces = (
        area._replace(end=min(area.end, start)),
        area._replace(start=max(area.start, end)),
    )
    return [piece for piece in pieces if piece.start < piece.end]
