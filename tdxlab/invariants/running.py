"""Invariants of what runs: vCPUs inside their LPs, their TLBs, and the epochs that count them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from tdxlab.arch import PAGE_SHIFT, level_size
from tdxlab.invariants.picture import Picture, TdPicture
from tdxlab.seam.rules import VCPU_ACTIVE, VCPU_STATE_NAMES, VCPU_UNINITIALIZED
from tdxlab.seam.td import NO_LP, Tdcs, Tdr


def vcpus_inside_use_only_mapped_pages(picture: Picture) -> Iterator[str]:
    """6: what the TLB of an LP holds for the guest inside is what its S-EPT maps, blocked or not.

    Until the TLBs were flushed a blocked page must stay where it is: that is TLB tracking.
    """
    cpu = picture.machine.cpu
    for lp in picture.inside:
        td = picture.tds.get(cpu.tdr_inside(lp))
        if td is None:
            yield f"LP {lp} runs a guest whose TDR {cpu.tdr_inside(lp):#x} is gone"
            continue
        mapped = {(link.gpa, link.sept_level): link.hpa for link in td.links if link.is_leaf}
        for (root, gfn), found in cpu.tlbs[lp].items():
            gpa = gfn << PAGE_SHIFT
            if root != td.root or td.is_shared(gpa):
                continue
            if found.hpa not in _translations(mapped, gpa):
                yield (
                    f"LP {lp} runs {td} and translates GPA {gpa:#x} to {found.hpa:#x}, "
                    "which is not mapped there any more"
                )


def _translations(mapped: dict[tuple[int, int], int], gpa: int) -> Iterator[int]:
    """Where `gpa` lies, by the leaf of each size that covers it."""
    for level in range(3):
        offset = gpa & (level_size(level) - 1)
        if (gpa - offset, level) in mapped:
            yield mapped[gpa - offset, level] + offset


def _inside_by_parity(picture: Picture, td: TdPicture) -> Counter[int]:
    """How many vCPUs of the TD are inside, by the parity of the epoch that they entered in."""
    inside = (picture.vcpus[tdvpr] for tdvpr in picture.inside.values() if tdvpr in picture.vcpus)
    return Counter(vcpu.epoch & 1 for vcpu in inside if vcpu.tdr == td.tdr)


def epoch_counts_cover_the_vcpus_inside(picture: Picture) -> Iterator[str]:
    """7: never less; a vCPU that is about to enter is counted before it is inside."""
    for td in picture.with_tdcs():
        inside = _inside_by_parity(picture, td)
        for parity in (0, 1):
            if td.tdcs_field(Tdcs.REFCOUNT + parity) < inside[parity]:
                yield _epoch_fault(td, parity, inside[parity])


def epoch_counts_are_the_vcpus_inside(picture: Picture) -> Iterator[str]:
    """7: exactly, unless the TD died with a vCPU that was never counted out."""
    for td in picture.with_tdcs():
        inside = _inside_by_parity(picture, td)
        for parity in (0, 1):
            exact = td.tdcs_field(Tdcs.REFCOUNT + parity) == inside[parity]
            if not exact and not td.tdr_field(Tdr.FATAL):
                yield _epoch_fault(td, parity, inside[parity])


def _epoch_fault(td: TdPicture, parity: int, inside: int) -> str:
    count = td.tdcs_field(Tdcs.REFCOUNT + parity)
    kind = ("even", "odd")[parity]
    return f"{td} counts {count} vCPUs of {kind} epochs, but {inside} are inside"


def vcpus_are_counted_right(picture: Picture) -> Iterator[str]:
    """8, the module's share: vCPUs that are ready, and vCPUs that are associated with an LP."""
    for td in picture.with_tdcs():
        vcpus = picture.vcpus_of(td)
        ready = sum(vcpu.state != VCPU_UNINITIALIZED for vcpu in vcpus)
        associated = sum(vcpu.lp != NO_LP for vcpu in vcpus)
        for name, word, counted in (
            ("vCPUs", Tdcs.NUM_VCPUS, ready),
            ("associated vCPUs", Tdcs.NUM_ASSOC_VCPUS, associated),
        ):
            if td.tdcs_field(word) != counted:
                yield f"{td} counts {td.tdcs_field(word)} {name}, and {counted} are there"


def active_vcpus_are_inside_their_lp(picture: Picture) -> Iterator[str]:
    """13: a dead TD's vCPU may stay marked as active when it has left."""
    places = Counter(picture.inside.values())
    for lp, tdvpr in picture.inside.items():
        vcpu = picture.vcpus.get(tdvpr)
        if vcpu is None:
            yield f"LP {lp} runs {tdvpr:#x}, which is no vCPU any more"
        elif (vcpu.state, vcpu.lp, places[tdvpr]) != (VCPU_ACTIVE, lp, 1):
            state = VCPU_STATE_NAMES.get(vcpu.state, vcpu.state)
            yield (
                f"LP {lp} runs the vCPU {tdvpr:#x}, one of {places[tdvpr]} that do; "
                f"it is {state} and associated with LP {vcpu.lp}"
            )
    for vcpu in picture.vcpus.values():
        td = picture.tds.get(vcpu.tdr)
        is_dead = td is None or td.tdr_field(Tdr.FATAL)
        if vcpu.state == VCPU_ACTIVE and vcpu.tdvpr not in places and not is_dead:
            yield f"the vCPU {vcpu.tdvpr:#x} is active, but no LP runs it"
