"""The PHYMEM calls of a teardown in the styles that the review of Linux's wrappers weighed.

    RAW          seamcall(leaf, rcx): numbers in registers; the caller makes every one of them
    NAMED        a function for each leaf, u64 arguments, outputs named by meaning
    LINUX_6_16   pages and TDs have types of their own, KeyIDs and outputs are u64; the global KeyID
                 is hidden behind a function for the TDR
    TYPED        as LINUX_6_16, and KeyIDs, flags and outputs have types too

A type is checked here when a function is called, or a result used; a C compiler says the same
before the program runs. A C compiler takes any number for a u64 and anything for a bool.

Source: the review of the PHYMEM wrappers on the Linux kernel mailing list; Linux 6.16,
arch/x86/virt/vmx/tdx/tdx.c. Differs: in Python; no style flushes or clears pages here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import Any, NamedTuple, TypeVar

from tdxlab.abi import leaves as abi
from tdxlab.abi.registers import Registers
from tdxlab.bits import MASK64
from tdxlab.study.phymem_scene import PhymemScene

LEAVES = {
    "reclaim": abi.TDH_PHYMEM_PAGE_RECLAIM,
    "cache_wb": abi.TDH_PHYMEM_CACHE_WB,
    "wbinvd": abi.TDH_PHYMEM_PAGE_WBINVD,
}


class Page(NamedTuple):
    """struct page. hpa: its address."""

    hpa: int


class TdxTd(NamedTuple):
    """struct tdx_td: what KVM has of a TD."""

    tdr: Page


class KeyId(NamedTuple):
    """A KeyID that KVM may use."""

    value: int


class PageType(IntEnum):
    """Page types that RECLAIM can say. Source: TDX module 1.5.01, pamt_manager.h."""

    REG, TDR, TDCX, TDVPR, EPT = 3, 4, 5, 6, 8


class PageSize(IntEnum):
    """Page sizes that RECLAIM can say."""

    SIZE_4K, SIZE_2M, SIZE_1G = range(3)


class Answer(NamedTuple):
    """What a call gave. outputs: name -> value, those that the style lets its caller see."""

    status: int
    outputs: Mapping[str, Any] = {}


class Site(NamedTuple):
    """One place where the caller makes a call. call: which one. arguments: place -> variable."""

    call: str
    arguments: Mapping[str, str]


class Style(NamedTuple):
    """One way to write the calls.

    calls: name -> function of the scene and the arguments. variables: what the caller has: name ->
    value of a scene. sites: name -> call. report: the line about a reclaimed page, of its type,
    owner and size. has_leaf_argument: the leaf is an argument, and can be mixed up with one.
    """

    name: str
    calls: Mapping[str, Callable[..., Answer]]
    variables: Callable[[PhymemScene], Mapping[str, Any]]
    sites: Mapping[str, Site]
    report: Callable[[Any, Any, Any], str]
    has_leaf_argument: bool = False


# -- registers


def seamcall(scene: PhymemScene, leaf: int, rcx: int) -> Answer:
    """The raw call: RAX and RCX in, everything out."""
    registers = Registers(rcx=rcx & MASK64)
    status = scene.seamcall(leaf, registers)
    outputs = {"type": registers.rcx, "owner": registers.rdx, "size": registers.r8}
    return Answer(status, outputs | {"R9": registers.r9})


def _raw(leaf: int) -> Callable[..., Answer]:
    """A raw call site: the caller has put RCX together, from one or two values."""

    def call(scene: PhymemScene, *values: int) -> Answer:
        rcx = values[0] if len(values) == 1 else scene.keyed(*values)
        return seamcall(scene, leaf, rcx)

    return call


def _report_numbers(page_type: int, owner: int, size: int) -> str:
    return f"type {page_type:#x} owner {owner:#x} size {size:#x}"


def _numbers(scene: PhymemScene) -> dict[str, Any]:
    return scene.values


_SITES = {
    "flush page": Site("wbinvd", {"hkid": "td_hkid", "page": "private"}),
    "start write-back": Site("cache_wb", {"resume": "start"}),
    "go on with write-back": Site("cache_wb", {"resume": "again"}),
    "reclaim page": Site("reclaim", {"page": "tdcs"}),
    "reclaim TDR": Site("reclaim", {"page": "tdr"}),
    "flush TDR": Site("wbinvd", {"hkid": "global_hkid", "page": "tdr"}),
}

RAW = Style(
    "raw",
    {name: _raw(leaf) for name, leaf in LEAVES.items()},
    _numbers,
    _SITES,
    _report_numbers,
    has_leaf_argument=True,
)


# -- names


def reclaim_named(scene: PhymemScene, page: int) -> Answer:
    """TDH.PHYMEM.PAGE.RECLAIM. page: HPA."""
    status, outputs = seamcall(scene, LEAVES["reclaim"], page)
    return Answer(status, {name: outputs[name] for name in ("type", "owner", "size")})


def cache_wb_named(scene: PhymemScene, resume: int) -> Answer:
    """TDH.PHYMEM.CACHE.WB. resume: 0 or 1."""
    return Answer(seamcall(scene, LEAVES["cache_wb"], resume).status)


def wbinvd_named(scene: PhymemScene, hkid: int, page: int) -> Answer:
    """TDH.PHYMEM.PAGE.WBINVD. page: HPA."""
    return Answer(seamcall(scene, LEAVES["wbinvd"], scene.keyed(hkid, page)).status)


NAMED = Style(
    "named",
    {"reclaim": reclaim_named, "cache_wb": cache_wb_named, "wbinvd": wbinvd_named},
    _numbers,
    _SITES,
    _report_numbers,
)


# -- types

T = TypeVar("T")


def require(value: Any, wanted: type[T]) -> T:
    """`value`, if it is of the type that the function declares, else TypeError."""
    if type(value) is not wanted:
        raise TypeError(f"{value!r} is no {wanted.__name__}")
    return value


def reclaim_page(scene: PhymemScene, page: Page) -> Answer:
    """As `reclaim_named`, of a Page."""
    return reclaim_named(scene, require(page, Page).hpa)


def cache_wb_any(scene: PhymemScene, resume: Any) -> Answer:
    """As `cache_wb_named`; C makes a bool of whatever it gets."""
    return cache_wb_named(scene, int(bool(resume)))


def wbinvd_hkid(scene: PhymemScene, hkid: int, page: Page) -> Answer:
    """As `wbinvd_named`, of a Page; any number for `hkid`."""
    if isinstance(hkid, Page | TdxTd):
        raise TypeError(f"{hkid!r} is no number")
    return wbinvd_named(scene, hkid, require(page, Page).hpa)


def wbinvd_tdr(scene: PhymemScene, td: TdxTd) -> Answer:
    """As `wbinvd_named`, of a TD's TDR under the global KeyID."""
    return wbinvd_named(scene, scene.values["global_hkid"], require(td, TdxTd).tdr.hpa)


def _pages(scene: PhymemScene) -> dict[str, Any]:
    """The caller's variables: pages have a type, and the global KeyID is not given to it."""
    values = scene.values
    pages = {name: Page(values[name]) for name in ("private", "tdcs", "tdr")}
    rest = {name: value for name, value in values.items() if name != "global_hkid"}
    return rest | pages | {"td": TdxTd(pages["tdr"])}


_PAGE_SITES = _SITES | {"flush TDR": Site("wbinvd_tdr", {"page": "td"})}

LINUX_6_16 = Style(
    "Linux 6.16",
    {
        "reclaim": reclaim_page,
        "cache_wb": cache_wb_any,
        "wbinvd": wbinvd_hkid,
        "wbinvd_tdr": wbinvd_tdr,
    },
    _pages,
    _PAGE_SITES,
    _report_numbers,
)


def reclaim_typed(scene: PhymemScene, page: Page) -> Answer:
    """As `reclaim_page`; each output has a type of its own. owner: None of a TDR."""
    status, words = reclaim_page(scene, page)
    if status:
        return Answer(status)
    owner = Page(words["owner"]) if words["owner"] else None
    outputs = {"type": PageType(words["type"]), "owner": owner, "size": PageSize(words["size"])}
    return Answer(status, outputs)


def cache_wb_typed(scene: PhymemScene, resume: bool) -> Answer:
    """As `cache_wb_named`, of a bool."""
    return cache_wb_named(scene, int(require(resume, bool)))


def wbinvd_typed(scene: PhymemScene, hkid: KeyId, page: Page) -> Answer:
    """As `wbinvd_named`, of a KeyId and a Page."""
    return wbinvd_named(scene, require(hkid, KeyId).value, require(page, Page).hpa)


def _typed(scene: PhymemScene) -> dict[str, Any]:
    flags = {name: bool(scene.values[name]) for name in ("start", "again")}
    return _pages(scene) | flags | {"td_hkid": KeyId(scene.values["td_hkid"])}


def _report_typed(page_type: PageType, owner: Page | None, size: PageSize) -> str:
    hpa = 0 if owner is None else require(owner, Page).hpa
    return _report_numbers(require(page_type, PageType), hpa, require(size, PageSize))


TYPED = Style(
    "typed",
    {
        "reclaim": reclaim_typed,
        "cache_wb": cache_wb_typed,
        "wbinvd": wbinvd_typed,
        "wbinvd_tdr": wbinvd_tdr,
    },
    _typed,
    _PAGE_SITES,
    _report_typed,
)

STYLES = (RAW, NAMED, LINUX_6_16, TYPED)
