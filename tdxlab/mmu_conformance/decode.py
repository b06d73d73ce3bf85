"""What a trace of the MMU says, in the model's words.

Numbers are hex strings from 10 on. An address in an SPTE is "pfn:0x..", or "pt#N" where it is a
page table's: the recorder numbered tables as they first appeared, so names are compared by
bijection with the addresses of ours.
"""

from __future__ import annotations

import re
from typing import Any

from tdxlab.kvm.params import (
    KVM_X86_DEFAULT_VM,
    KVM_X86_SW_PROTECTED_VM,
    KVM_X86_TDX_VM,
    MmuParams,
    VmConfig,
)
from tdxlab.recorded import Step, TraceError

#: ("pfn", frame number) or ("pt", name or HPA of a table).
Place = tuple[str, int]

_VM_TYPES = {
    "default": KVM_X86_DEFAULT_VM,
    "sw_protected": KVM_X86_SW_PROTECTED_VM,
    "tdx": KVM_X86_TDX_VM,
}
_HEX = re.compile(r"0x[0-9a-f]+\Z")


def integer(value: Any) -> int:
    """A number of a trace, negative errno among them. Refuses anything else: TraceError."""
    try:
        return int(value, 0) if isinstance(value, str) else int(value)
    except (TypeError, ValueError):
        raise TraceError(f"{value!r} is not a number") from None


def plain(value: Any) -> Any:
    """A recorded value with its numbers as ints, its addresses as places, its lists as tuples."""
    if isinstance(value, list):
        return tuple(plain(item) for item in value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if not isinstance(value, str):
        return value
    if value.startswith("pt#"):
        return ("pt", int(value[3:]))
    if value.startswith("pfn:"):
        return ("pfn", int(value[4:], 16))
    return int(value, 16) if _HEX.match(value) else value


class Args:
    """The arguments of one operation."""

    def __init__(self, given: Step) -> None:
        self._given = given

    @classmethod
    def parse(cls, words: list[str]) -> Args:
        """From `name=value` words, as nested operations have them."""
        return cls(dict(word.split("=", 1) for word in words))

    def __contains__(self, name: str) -> bool:
        return name in self._given

    def number(self, name: str, default: int | None = None) -> int:
        """A numeric argument. Refuses one that is missing and has no default: TraceError."""
        value = self._given.get(name, default)
        if value is None:
            raise TraceError(f"argument {name!r} is missing")
        return integer(value)

    def flag(self, name: str, default: int = 0) -> bool:
        """An argument that is 0 or 1."""
        return bool(self.number(name, default))

    def text(self, name: str) -> str:
        """An argument that is a word. Refuses one that is missing: TraceError."""
        if name not in self._given:
            raise TraceError(f"argument {name!r} is missing")
        return str(self._given[name])


def params(raw: Step) -> MmuParams:
    """The host's CPU and module parameters; absent ones as the recorder had them by default."""
    return MmuParams(
        maxphyaddr=integer(raw["maxpa"]),
        ad_bits=bool(raw["ad"]),
        execute_only=bool(raw["xo"]),
        nx_huge_pages=bool(raw.get("nx", 0)),
        eager_page_split=bool(raw.get("eager", 1)),
        l1tf=bool(raw.get("l1tf", 0)),
        mmio_caching=bool(raw.get("mmio_caching", 1)),
    )


def config(raw: Step) -> VmConfig:
    """What user space chose for the VM. Refuses a type that it does not know: TraceError."""
    vm_type = _VM_TYPES.get(raw["type"])
    if vm_type is None:
        raise TraceError(f"unknown VM type {raw['type']!r}; known are {', '.join(_VM_TYPES)}")
    return VmConfig(
        vm_type=vm_type,
        root_level=integer(raw["root_level"]),
        gfn_direct_bits=integer(raw["gfn_direct_bits"]),
        slot_zap_all=bool(raw.get("slot_zap_all", 1)),
        ignore_guest_pat=vm_type != KVM_X86_TDX_VM,
        dirty_log_size=integer(raw.get("pml", 0)),
        manual_dirty_log_protect=integer(raw.get("manual_protect", 0)),
    )
