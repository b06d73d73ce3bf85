"""Conversion policies: one that does what VMMs do, others that keep the rules, and some that break
one each.
"""

from __future__ import annotations

from collections.abc import Iterator

from tdxlab.conversion import ConversionPolicy, ConvertingVmm, Request


class AsQemu(ConversionPolicy):
    """All that was asked for at once; the memory of the old kind is given back at once, too.

    Source: QEMU 10, accel/kvm/kvm-all.c, kvm_convert_memory.
    """

    name = "QEMU"

    def convert(self, vmm: ConvertingVmm, request: Request) -> None:
        """Two calls."""
        vmm.set_attributes(request.gfn, request.pages, private=request.private)
        give_back(vmm, request)


class KeepsBoth(ConversionPolicy):
    """Gives nothing back: a page that was both kinds once has memory twice."""

    name = "keeps both"

    def convert(self, vmm: ConvertingVmm, request: Request) -> None:
        """One call."""
        vmm.set_attributes(request.gfn, request.pages, private=request.private)


class PreFaults(ConversionPolicy):
    """Maps what has become the other kind before the guest uses it."""

    name = "pre-faults"

    def convert(self, vmm: ConvertingVmm, request: Request) -> None:
        """As QEMU, and one call more."""
        AsQemu().convert(vmm, request)
        vmm.pre_fault(request.gfn, request.pages)


class Pieces(ConversionPolicy):
    """A few pages at a time, so that others who want KVM's locks wait less. size: pages, 1 or more.

    Refuses another size: ValueError.
    """

    def __init__(self, size: int = 16) -> None:
        if not (isinstance(size, int) and size > 0):
            raise ValueError(f"pieces of {size!r} pages; choose 1 or more")
        self.size = size
        self.name = f"pieces of {size}"

    def convert(self, vmm: ConvertingVmm, request: Request) -> None:
        """Two calls for each piece."""
        for gfn in request.gfns[:: self.size]:
            pages = min(self.size, request.gfns.stop - gfn)
            AsQemu().convert(vmm, request._replace(gfn=gfn, pages=pages))


class PunchesLate(ConversionPolicy):
    """Collects the private pages that are to be punched out, and punches neighbours together. What
    becomes private again before that is not punched. most: pages that may wait, 1 or more.

    Refuses another number: ValueError.
    """

    def __init__(self, most: int = 24) -> None:
        if not (isinstance(most, int) and most > 0):
            raise ValueError(f"{most!r} pages may wait; choose 1 or more")
        self.most = most
        self.name = f"punches late, {most}"
        self.waiting: set[int] = set()

    def convert(self, vmm: ConvertingVmm, request: Request) -> None:
        """Attributes at once."""
        vmm.set_attributes(request.gfn, request.pages, private=request.private)
        if request.private:
            self.waiting.difference_update(request.gfns)
            vmm.discard(request.gfn, request.pages)
            return
        self.waiting.update(request.gfns)
        if len(self.waiting) > self.most:
            for gfn, pages in runs(self.waiting):
                vmm.punch(gfn, pages)
            self.waiting.clear()


class Lazy(ConversionPolicy):
    """Nothing on request: a page is converted when the guest uses it.

    Differs: a page that was never used as shared memory is still accepted when it becomes private
    again. The model's guest takes that for a success.
    """

    name = "lazy"

    def convert(self, vmm: ConvertingVmm, request: Request) -> None:
        """One page, if any."""
        if request.implicit:
            AsQemu().convert(vmm, request)


def give_back(vmm: ConvertingVmm, request: Request) -> None:
    """Give the memory of the kind back that the pages are not any more."""
    if request.private:
        vmm.discard(request.gfn, request.pages)
    else:
        vmm.punch(request.gfn, request.pages)


def runs(gfns: set[int]) -> Iterator[tuple[int, int]]:
    """(first gfn, pages) of each run of neighbours."""
    for first in sorted(gfn for gfn in gfns if gfn - 1 not in gfns):
        pages = 1
        while first + pages in gfns:
            pages += 1
        yield first, pages


#: Policies that keep the rules, QEMU's first.
CONVERSION_POLICIES: tuple[ConversionPolicy, ...] = (
    AsQemu(),
    KeepsBoth(),
    PreFaults(),
    Pieces(16),
    PunchesLate(24),
    Lazy(),
)


# -- each breaks one rule


class OneTooFew(ConversionPolicy):
    """Forgets the last page."""

    def convert(self, vmm: ConvertingVmm, request: Request) -> None:
        """Of a single page nothing is left."""
        if request.pages > 1:
            AsQemu().convert(vmm, request._replace(pages=request.pages - 1))


class OneTooMany(ConversionPolicy):
    """Takes the next page with it."""

    def convert(self, vmm: ConvertingVmm, request: Request) -> None:
        """The guest still uses that."""
        AsQemu().convert(vmm, request._replace(pages=request.pages + 1))


class OtherWay(ConversionPolicy):
    """Mixes the kinds up."""

    def convert(self, vmm: ConvertingVmm, request: Request) -> None:
        """What is private stays private."""
        vmm.set_attributes(request.gfn, request.pages, private=not request.private)


class PunchesTooLate(PunchesLate):
    """Punches what has become private again."""

    def __init__(self) -> None:
        super().__init__()
        self.name = "PunchesTooLate"

    def convert(self, vmm: ConvertingVmm, request: Request) -> None:
        """What waits goes, whatever it is by now."""
        waiting = set(self.waiting)
        super().convert(vmm, request)
        if request.private:
            self.waiting |= waiting


class TidiesUp(ConversionPolicy):
    """Gives all shared memory back when some has become private."""

    def convert(self, vmm: ConvertingVmm, request: Request) -> None:
        """Other pages are shared still."""
        AsQemu().convert(vmm, request)
        if request.private:
            vmm.discard(0, vmm.pages)


class WaitsForKvm(ConversionPolicy):
    """Waits until the pages have the other kind."""

    def convert(self, vmm: ConvertingVmm, request: Request) -> None:
        """Nobody else will convert them."""
        while vmm.is_private(request.gfn) != request.private:
            pass


#: Policies that break a rule.
WRONG_CONVERSIONS: tuple[ConversionPolicy, ...] = (
    OneTooFew(),
    OneTooMany(),
    OtherWay(),
    PunchesTooLate(),
    TidiesUp(),
    WaitsForKvm(),
)
