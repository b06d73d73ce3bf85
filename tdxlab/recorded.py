"""What a recorded trace says, in the model's words: numbers, the platform, registers, host memory.

Numbers are hex strings, or plain ints. What cannot be understood is a TraceError.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tdxlab.abi.registers import MASK64, REGISTER_NAMES, Registers
from tdxlab.abi.structs import (
    TSC_FREQUENCY_1_GHZ,
    XFAM_MINIMUM,
    make_td_params,
    make_tdmr_info,
)
from tdxlab.arch import PAGE_SIZE
from tdxlab.hardware import Platform, Region, TdmrPlan

Step = dict[str, Any]

#: What the recorder calls "valid TD_PARAMS", and what stands in TD_PARAMS that a host write made.
_VALID_FIELDS = {"xfam": XFAM_MINIMUM, "tsc": TSC_FREQUENCY_1_GHZ}
VALID_TD_PARAMS = _VALID_FIELDS | {"max_vcpus": 4, "eptp": 0x1E}

_PAMT_ENTRY = 16


class TraceError(Exception):
    """Input that is not a trace, or not one that this replayer understands."""


def number(value: Any) -> int:
    """A number of a trace, 0 to 2**64 - 1. Refuses anything else: TraceError."""
    is_plain = isinstance(value, int) and not isinstance(value, bool)
    try:
        found = int(value) if is_plain else int(value, 16)
    except (TypeError, ValueError):
        raise TraceError(f"{value!r} is not a number (hex string)") from None
    if not 0 <= found <= MASK64:
        raise TraceError(f"{found:#x} does not fit 64 bits")
    return found


def registers(given: Step) -> Registers:
    """Registers by name, absent ones 0. Refuses names that do not exist: TraceError."""
    for name in given:
        require_register(name)
    return Registers(**{name: number(value) for name, value in given.items()})


def require_register(name: str) -> None:
    """Refuse, with a TraceError, a register that does not exist."""
    if name not in REGISTER_NAMES:
        raise TraceError(f"unknown register {name!r}")


def platform(raw: Step) -> Platform:
    """The hardware that a trace was recorded on; everything below the first CMR is low memory."""
    cmrs = tuple(_region(cmr) for cmr in raw["cmrs"])
    return Platform(
        low_memory=Region(0, min(cmrs).base),
        cmrs=cmrs,
        tdmrs=tuple(_tdmr_plan(tdmr) for tdmr in raw["tdmrs"]),
        pamt_region=number(raw["pamt_region"]),
        seamrr=_region(raw["seamrr"]),
        keyid_bits=number(raw["hkid_bits"]),
        private_keyids=(number(raw["private_hkid_min"]), number(raw["private_hkid_max"])),
        global_keyid=number(raw["tdx_global_hkid"]),
        max_pa_bits=number(raw["maxpa"]),
        package_of=tuple(number(package) for package in raw["lp_to_package"]),
        wbinvd_sub_blocks=number(raw["wbinvd_sub_blocks"]),
    )


def _region(raw: Step) -> Region:
    return Region(number(raw["base"]), number(raw["size"]))


def _tdmr_plan(raw: Step) -> TdmrPlan:
    areas = (Region(number(area["offset"]), number(area["size"])) for area in raw["reserved"])
    return TdmrPlan(*_region(raw), tuple(areas))


# -- host memory: (address, bytes) to be written


def inputs(given: Step, rdx: int) -> Iterator[tuple[int, bytes]]:
    """What the recorder had in memory for one call. given: its `mem_in`; rdx: as the call has it,
    where TD_PARAMS lie.
    """
    if "source_page" in given:
        source = given["source_page"]
        yield number(source["pa"]), _pattern(_pattern_number(source["pattern"]))
    if "TD_PARAMS" in given:
        params = bytearray(td_params(given["TD_PARAMS"]))
        if "plus_byte" in given:
            params[number(given["plus_byte"]["offset"])] = number(given["plus_byte"]["value"])
        yield rdx, bytes(params)


def host_write(step: Step) -> Iterator[tuple[int, bytes]]:
    """What a HOST_WRITE stores: TDMR_INFOs and their pointers, TD_PARAMS, or a source page."""
    if "tdmrs" in step:
        array = number(step["ptr_array"])
        for place, raw in enumerate(step["tdmrs"]):
            info = array + PAGE_SIZE * (place + 1)
            yield array + 8 * place, info.to_bytes(8, "little")
            yield info, _tdmr_info(raw)
    elif "fields" in step:
        yield number(step["pa"]), td_params(_VALID_FIELDS | step["fields"])
    else:
        yield number(step["pa"]), _pattern(0)


def _pattern(i: int) -> bytes:
    """The recorder's source page: byte j is i*7 + j."""
    return bytes((i * 7 + j) & 0xFF for j in range(PAGE_SIZE))


def _pattern_number(text: str) -> int:
    """The i of "byte[j]=(i*7+j)&0xff"."""
    return int(text.partition("(")[2].partition("*")[0])


def td_params(fields: Step) -> bytes:
    """TD_PARAMS from the recorder's names of its fields, absent ones 0."""
    values = {name: number(value) for name, value in fields.items()}
    return make_td_params(
        max_vcpus=values.get("max_vcpus", 0),
        eptp_controls=values.get("eptp", 0),
        attributes=values.get("attributes", 0),
        xfam=values.get("xfam", 0),
        num_l2_vms=values.get("num_l2", 0),
        config_flags=values.get("config", 0),
        tsc_frequency=values.get("tsc", 0),
    )


def _tdmr_info(raw: Step) -> bytes:
    """A TDMR_INFO as the recorder writes it: PAMT sizes follow from the TDMR's size."""
    size = number(raw["size"])
    size_2m = -(-((size >> 21) * _PAMT_ENTRY) // PAGE_SIZE) * PAGE_SIZE
    return make_tdmr_info(
        number(raw["base"]),
        size,
        pamt_1g=(number(raw["pamt_1g"][0]), PAGE_SIZE),
        pamt_2m=(number(raw["pamt_2m"]), size_2m),
        pamt_4k=(number(raw["pamt_4k"]), (size >> 12) * _PAMT_ENTRY),
        reserved=[(number(offset), number(length)) for offset, length in raw["reserved"]],
    )
