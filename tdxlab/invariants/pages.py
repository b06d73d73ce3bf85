"""Invariants of pages: what the Secure EPT, the PAMT and the TDs' own counts say of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from tdxlab.arch import level_size
from tdxlab.invariants.picture import Link, Picture, TdPicture, name_of
from tdxlab.seam.pamt import PAGES_OF_SIZE, SIZE_NAMES
from tdxlab.seam.rules import PAGE_TYPE_NAMES, PT_EPT, PT_NDA, PT_REG, PT_TDCX, PT_TDR
from tdxlab.seam.td import Tdr


def what_the_sept_links_is_owned_by_the_td(picture: Picture) -> Iterator[str]:
    """3: a leaf's page is PT_REG at the leaf's size, a table PT_EPT, and the TD owns both."""
    pamt = picture.machine.module.pamt
    for td in picture.living():
        for link in td.links:
            page_type, size = (PT_REG, link.sept_level) if link.is_leaf else (PT_EPT, 0)
            entry = pamt.entry(link.hpa, size)
            if (pamt.page_type(entry), pamt.owner(entry)) != (page_type, td.tdr):
                found = pamt.describe(link.hpa, size)
                yield (
                    f"{link} of {td} holds {name_of(found)} with owner {found.owner:#x}; "
                    f"it should be {PAGE_TYPE_NAMES[page_type]} of that TD"
                )


def nothing_is_linked_twice(picture: Picture) -> Iterator[str]:
    """3: a page or table is under one entry of one TD."""
    seen: dict[int, tuple[Link, TdPicture]] = {}
    for td in picture.living():
        for link in td.links:
            if link.hpa in seen:
                other, owner = seen[link.hpa]
                yield f"{link} of {td} holds {link.hpa:#x}, and so does {other} of {owner}"
            seen[link.hpa] = link, td


def what_a_td_owns_is_in_its_sept(picture: Picture) -> Iterator[str]:
    """3: every private page and table of a TD can be reached from its root."""
    for td in picture.living():
        linked = {link.hpa for link in td.links}
        for row in picture.owned[td.tdr]:
            if row.page_type in (PT_REG, PT_EPT) and row.hpa not in linked:
                yield f"{name_of(row)} belongs to {td}, but no entry of its S-EPT holds it"


def child_count_is_the_pages_owned(picture: Picture) -> Iterator[str]:
    """4: in units of 4 KiB, the TDR itself left out."""
    for td in picture.tds.values():
        counted = sum(PAGES_OF_SIZE[row.size] for row in picture.owned[td.tdr])
        if counted != td.tdr_field(Tdr.CHLDCNT):
            yield f"{td} counts {td.tdr_field(Tdr.CHLDCNT)} children and owns {counted} pages"


def pages_are_counted_right(picture: Picture) -> Iterator[str]:
    """8, the module's share: control pages as TDR and TDVPRs count them, private pages as the S-EPT
    has leaves of their size.
    """
    for td in picture.living():
        vcpu_pages = sum(vcpu.pages - 1 for vcpu in picture.vcpus_of(td))
        control = td.tdr_field(Tdr.NUM_TDCX) + vcpu_pages
        owned = Counter((row.page_type, row.size) for row in picture.owned[td.tdr])
        leaves = Counter(link.sept_level for link in td.links if link.is_leaf)
        counts = [("control pages", control, owned[PT_TDCX, 0])]
        for size, name in enumerate(SIZE_NAMES):
            counts.append((f"{name} leaves", leaves[size], owned[PT_REG, size]))
        for name, kept, counted in counts:
            if kept != counted:
                yield f"{td} has {kept} {name}, and the PAMT has {counted} such pages of it"


def pages_in_use_belong_to_a_td(picture: Picture) -> Iterator[str]:
    """5, the module's share: a page is free, reserved, a TDR, or owned by a TDR that is there."""
    for row in picture.rows:
        if row.page_type == PT_TDR and row.owner:
            yield f"{name_of(row)} has the owner {row.owner:#x}; a TDR has none"
        elif row.page_type not in (PT_NDA, PT_TDR) and row.owner not in picture.tds:
            yield f"{name_of(row)} has the owner {row.owner:#x}, which is no TDR"


def pages_are_represented_at_one_level(picture: Picture) -> Iterator[str]:
    """12: an entry in use has only free ones above it; big pages are PT_REG."""
    rows = [row for row in picture.rows if row.page_type != PT_NDA]
    for size in (1, 2):
        used, mask = {row.hpa for row in rows if row.size == size}, -level_size(size)
        for row in rows:
            if row.size == size and row.page_type != PT_REG:
                yield f"{name_of(row)} is bigger than 4 KiB and not PT_REG"
            elif row.size < size and row.hpa & mask in used:
                yield f"{name_of(row)} lies in a page that is in use as {SIZE_NAMES[size]}"
