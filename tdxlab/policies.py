"""Zap policies: the kernel's, others that keep the rules, and some that break one each."""

from __future__ import annotations

from collections.abc import Sequence

from tdxlab.arch import ENTRIES_PER_TABLE
from tdxlab.policy import SUCCESS, ZapHost, ZapPolicy


class KernelPolicy(ZapPolicy):
    """Linux 6.16: one page after the other, with a TRACK and a kick for each.

    Source: arch/x86/kvm/vmx/tdx.c, tdx_sept_remove_private_spte.
    """

    name = "kernel"

    def zap(self, host: ZapHost, pages: Sequence[int]) -> None:
        """Block, track, kick, remove and write back each page."""
        for gfn in pages:
            host.block(gfn)
            flush(host)
            take_out(host, [gfn])


class Batches(ZapPolicy):
    """Many pages with one TRACK and one kick. size: pages in a batch, 1 or more.

    Refuses another size: ValueError.
    """

    def __init__(self, size: int = 64) -> None:
        if not (isinstance(size, int) and size > 0):
            raise ValueError(f"batches of {size!r} pages; choose 1 or more")
        self.size = size
        self.name = f"batches of {size}"

    def zap(self, host: ZapHost, pages: Sequence[int]) -> None:
        """Block a batch, flush, take it out; then the next."""
        for first in range(0, len(pages), self.size):
            batch = pages[first : first + self.size]
            for gfn in batch:
                host.block(gfn)
            flush(host)
            take_out(host, batch)


class AllAtOnce(ZapPolicy):
    """One TRACK and one kick for the whole zap."""

    name = "all at once"

    def zap(self, host: ZapHost, pages: Sequence[int]) -> None:
        """Block everything, flush, take everything out."""
        Batches(len(pages)).zap(host, pages)


class Patient(ZapPolicy):
    """No kick, unless vCPUs do not leave by themselves. patience: REMOVEs that may be refused."""

    name = "patient"

    def __init__(self, patience: int = 20) -> None:
        self.patience = patience

    def zap(self, host: ZapHost, pages: Sequence[int]) -> None:
        """Block everything and track; ask for the first page until it is given."""
        for gfn in pages:
            host.block(gfn)
        if host.track() != SUCCESS:
            flush(host)
        for _ in range(self.patience):
            if host.remove(pages[0]) == SUCCESS:
                break
        else:
            host.kick()
            host.remove(pages[0])
        host.writeback(pages[0])
        take_out(host, pages[1:])


class RegionFirst(ZapPolicy):
    """Where a whole region of 2 MiB goes, its table is closed with one call, and opened again, for
    the module finds no page below a closed table.
    """

    name = "region first"

    def zap(self, host: ZapHost, pages: Sequence[int]) -> None:
        """Close whole regions and flush; open them again and take everything out at once."""
        regions = whole_regions(host)
        for gfn in regions:
            host.block(gfn, level=2)
        if regions:
            flush(host)
        for gfn in regions:
            host.unblock(gfn, level=2)
        AllAtOnce().zap(host, pages)


def flush(host: ZapHost) -> None:
    """What KVM does to TLBs: TRACK, and a kick. Where TRACK is refused, a kick comes before."""
    if host.track() != SUCCESS:
        host.kick()
        host.track()
    host.kick()


def take_out(host: ZapHost, pages: Sequence[int]) -> None:
    """Remove pages that are blocked and tracked, and write them back."""
    for gfn in pages:
        host.remove(gfn)
        host.writeback(gfn)


def whole_regions(host: ZapHost) -> list[int]:
    """First gfns of the regions of 2 MiB that lie in the range with all their gfns."""
    size = ENTRIES_PER_TABLE
    first = -(-host.start // size) * size
    return list(range(first, host.end - size + 1, size))


#: Policies that keep the rules, the kernel's first.
POLICIES: tuple[ZapPolicy, ...] = (
    KernelPolicy(),
    Batches(8),
    Batches(64),
    AllAtOnce(),
    Patient(),
    RegionFirst(),
)


# -- each breaks one rule


class NoTrack(ZapPolicy):
    """Kicks, and trusts that this flushes."""

    def zap(self, host: ZapHost, pages: Sequence[int]) -> None:
        """Without TRACK."""
        for gfn in pages:
            host.block(gfn)
        host.kick()
        take_out(host, pages)


class KickFirst(ZapPolicy):
    """Kicks before it tracks."""

    def zap(self, host: ZapHost, pages: Sequence[int]) -> None:
        """The kick at the wrong place."""
        for gfn in pages:
            host.block(gfn)
        host.kick()
        host.track()
        take_out(host, pages)


class NoBlock(ZapPolicy):
    """Flushes, and removes what anybody may still translate."""

    def zap(self, host: ZapHost, pages: Sequence[int]) -> None:
        """Without BLOCK."""
        flush(host)
        take_out(host, pages)


class RemovesTwice(ZapPolicy):
    """Wants to be sure."""

    def zap(self, host: ZapHost, pages: Sequence[int]) -> None:
        """REMOVE of what is gone."""
        AllAtOnce().zap(host, pages)
        host.remove(pages[-1])


class ForgetsOne(ZapPolicy):
    """Counts to one too few."""

    def zap(self, host: ZapHost, pages: Sequence[int]) -> None:
        """The last page stays."""
        for gfn in pages[:-1]:
            host.block(gfn)
        flush(host)
        take_out(host, pages[:-1])


class NoWriteback(ZapPolicy):
    """Leaves lines of the TD's in the caches."""

    def zap(self, host: ZapHost, pages: Sequence[int]) -> None:
        """Without WRITEBACK."""
        for gfn in pages:
            host.block(gfn)
        flush(host)
        for gfn in pages:
            host.remove(gfn)


class RegionOnly(ZapPolicy):
    """One BLOCK for 512 pages, and then the pages."""

    def zap(self, host: ZapHost, pages: Sequence[int]) -> None:
        """Below a closed table nothing is found."""
        regions = whole_regions(host)
        for gfn in regions:
            host.block(gfn, level=2)
        for gfn in pages if not regions else ():
            host.block(gfn)
        flush(host)
        take_out(host, pages)


class WaitsForEver(ZapPolicy):
    """Asks until it gets the page, and makes nobody leave."""

    def zap(self, host: ZapHost, pages: Sequence[int]) -> None:
        """A loop without an end, as long as one vCPU stays inside."""
        for gfn in pages:
            host.block(gfn)
        host.track()
        for gfn in pages:
            while host.remove(gfn) != SUCCESS:
                pass
            host.writeback(gfn)


#: Policies that break a rule.
WRONG_POLICIES: tuple[ZapPolicy, ...] = (
    NoTrack(),
    KickFirst(),
    NoBlock(),
    RemovesTwice(),
    ForgetsOne(),
    NoWriteback(),
    RegionOnly(),
    WaitsForEver(),
)
