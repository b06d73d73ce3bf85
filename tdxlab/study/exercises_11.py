"""Exercises of notebook 11: what is in MRTD, what is not, and how to recompute it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from itertools import permutations
from random import Random
from typing import Any

from tdxlab.arch import PAGE_SIZE
from tdxlab.measure import PER_SECTION, launch
from tdxlab.study.exercises import Exercise, Variant
from tdxlab.study.firmware_image import flipped, in_order, small_firmware, swapped
from tdxlab.study.launch_changes import TRIALS, verdicts
from tdxlab.study.measured_launch import TD_INFO, Recipe, build
from tdxlab.study.measurement_log import (
    CHUNK_SIZE,
    CHUNKS,
    ORDERS,
    PAGE_ADD,
    SMALL_IMAGE,
    Image,
    Page,
    Record,
    extend_rtmr,
    flip_byte,
    hashed,
    log_of,
    mrtd,
)
from tdxlab.tdvf import parse

_FIRST_GPA = 0x4000_0000


def bytes_hashed(_gpaw: int, seed: int) -> Variant:
    """How many bytes does SHA-384 take in for an image?"""
    draw = Random(seed)
    whole, added = draw.randint(2, 9), draw.randint(1, 9)
    pages = [Page("A", _FIRST_GPA + n * PAGE_SIZE) for n in range(whole + added)]
    image = (*pages[:whole], *(page._replace(chunks=()) for page in pages[whole:]))
    content = (whole + added) * PAGE_SIZE

    def hint(answer: Any) -> str:
        if answer in (content, whole * PAGE_SIZE):
            return "That is page content alone. Count the blocks that name each call too."
        if answer == whole * PAGE_SIZE + (whole + added) * 128:
            return "TDH.MR.EXTEND hashes a block of its own before each 256 bytes."
        return (
            "Sum over the calls: len(record.data) of one PAGE.ADD record and of one EXTEND record "
            "in the cells above, times how often each is called."
        )

    question = (
        f"A host adds {whole + added} pages and measures {whole} of them completely. "
        "How many bytes does the module feed to SHA-384 before it finalises?"
    )
    return Variant(question, len(hashed(log_of(image))), hint)


def digests_of_one_image(_gpaw: int, seed: int) -> Variant:
    """How many MRTDs can one and the same image have?"""
    count = Random(seed).randint(2, 3)
    pages = [Page("A", _FIRST_GPA + n * PAGE_SIZE, b"page %d" % n) for n in range(count)]
    logs = [log_of(image, order) for image in permutations(pages) for order in ORDERS]
    found = {mrtd(log) for log in logs}

    def hint(answer: Any) -> str:
        if answer == 1:
            return "SHA-384 reads the records one behind the other: another order, another digest."
        return (
            "Build a set: mrtd(log_of(image, order)) for every permutation of the pages and for "
            "both orders in ORDERS; then take its length."
        )

    question = (
        f"{count} pages of one section, all measured completely. The host may add the pages in any "
        "order, and it may measure each page right after adding it, or add all of them first and "
        "then measure them in the same order. How many different MRTDs can come out?"
    )
    return Variant(question, len(found), hint)


def seen_changes(gpaw: int, seed: int) -> Variant:
    """Which of five changes does MRTD see?"""
    trials = Random(seed).sample(TRIALS, 5)
    letters = dict(zip("abcde", verdicts(Recipe(gpaw=gpaw), trials), strict=True))
    seen = {letter for letter, verdict in letters.items() if verdict.mrtd == "changes"}

    def hint(answer: Any) -> str:
        given = {str(letter).strip().casefold() for letter in answer}
        unknown = given - set(letters)
        if unknown:
            return f"Answer with a set of letters a to e; {min(unknown)!r} is none of them."
        return (
            f"{len(given - seen)} too many, {len(seen - given)} missing. Do each change in the "
            "panel: MRTD before and after stand in its last table."
        )

    listed = "\n".join(f"  {letter}) {verdict.what}" for letter, verdict in letters.items())
    question = f"Which of these move MRTD of the small image? A set of letters.\n{listed}"
    return Variant(question, seen, hint)


def own_mrtd(_gpaw: int, seed: int) -> Variant:
    """Recompute an MRTD with hashlib."""
    draw = Random(seed)
    gpa, filling = _FIRST_GPA + draw.randrange(512) * PAGE_SIZE, draw.randint(1, 255)
    chunks = tuple(draw.sample(range(CHUNKS), 2))
    page = Page("A", gpa, bytes([filling]) * PAGE_SIZE, chunks)
    log = log_of((page,))

    def hint(answer: Any) -> str:
        given = str(answer).strip().casefold()
        found = [advice for wrong, advice in _wrong_mrtds(log, page) if wrong == given]
        if found:
            return found[0]
        if len(given) != 96:
            return f"MRTD is 96 hex digits; this has {len(given)}. Use .hexdigest() of SHA-384."
        return "Compare your bytes with hashed(log_of(image)): the first difference tells."

    question = (
        f"A host adds one page at GPA {gpa:#x}, every byte of it {filling:#04x}, and measures its "
        f"chunks {chunks[0]} and {chunks[1]}, in this order. MRTD, as 96 hex digits?"
    )
    return Variant(question, mrtd(log), hint)


def _wrong_mrtds(log: list[Record], page: Page) -> Iterator[tuple[str, str]]:
    """What usual mistakes give, and what to say to them."""
    heads = [record.data[:16] + record.gpa.to_bytes(8, "big") for record in log]
    big = b"".join(
        head.ljust(128, b"\0") + record.content for head, record in zip(heads, log, strict=True)
    )
    yield (
        _sha(page.content),
        "You hashed the page. PAGE.ADD hashes no content, EXTEND 256 bytes of it.",
    )
    yield (
        _sha(b"".join(record.content for record in log)),
        "Each call also hashes a block of 128 bytes with its name and GPA.",
    )
    yield mrtd(log[1:]), "You left out the record of TDH.MEM.PAGE.ADD."
    yield mrtd(log[:1]), "You left out the records of TDH.MR.EXTEND."
    yield mrtd([log[0], log[2], log[1]]), "The order of the calls counts."
    yield _sha(big), "The GPA stands in the block with its lowest byte first."
    same = [record if record.call == PAGE_ADD else record._replace(gpa=page.gpa) for record in log]
    yield mrtd(same), "TDH.MR.EXTEND hashes the GPA of its chunk, not that of the page."


def _sha(data: bytes) -> str:
    return hashlib.sha384(data).hexdigest()


def unseen_byte(gpaw: int, seed: int) -> Variant:
    """Find a byte of the image that the host may change unseen."""
    draw = Random(seed)
    image = tuple(
        Page("A", _FIRST_GPA + n * PAGE_SIZE, b"page %d" % n, _drawn_chunks(draw)) for n in range(2)
    )
    before = build(Recipe(image, gpaw=gpaw)).mrtd()

    def is_unseen(answer: Any) -> bool:
        place = _place_of(image, answer)
        if place is None:
            return False
        other = flip_byte(image, place, answer % PAGE_SIZE)
        return build(Recipe(other, gpaw=gpaw)).mrtd() == before

    def hint(answer: Any) -> str:
        if isinstance(answer, bool) or not isinstance(answer, int):
            return f"{answer!r} is not a GPA; write a number such as {image[0].gpa:#x}."
        place = _place_of(image, answer)
        if place is None:
            return f"{answer:#x} lies in neither page."
        chunk = answer % PAGE_SIZE // CHUNK_SIZE
        return (
            f"That byte is in chunk {chunk} of page {place}, and flipping it moves MRTD. "
            "Look for a chunk that no TDH.MR.EXTEND names."
        )

    free = next(number for number in range(CHUNKS) if number not in image[0].chunks)
    listed = "; ".join(f"page at {page.gpa:#x}: chunks {_ranges(page)}" for page in image)
    question = (
        f"A host adds two pages and measures these chunks of them: {listed}. "
        "Give the GPA of a byte that it may change without moving MRTD."
    )
    example = f"{image[0].gpa + free * CHUNK_SIZE:#x} for one"
    return Variant(question, example, hint, is_unseen)


def _drawn_chunks(draw: Random) -> tuple[int, ...]:
    """All chunks but one or two."""
    left_out = draw.sample(range(CHUNKS), draw.randint(1, 2))
    return tuple(number for number in range(CHUNKS) if number not in left_out)


def _ranges(page: Page) -> str:
    return " ".join(map(str, page.chunks))


def _place_of(image: Image, gpa: Any) -> int | None:
    """The page that holds the byte at `gpa`, None if none does or it is no number."""
    if isinstance(gpa, bool) or not isinstance(gpa, int):
        return None
    found = (n for n, page in enumerate(image) if page.gpa <= gpa < page.gpa + PAGE_SIZE)
    return next(found, None)


_EVENTS = ("kernel", "command line", "initial ramdisk", "boot loader", "policy")


def own_rtmr(_gpaw: int, seed: int) -> Variant:
    """Compute an RTMR after two extensions."""
    first, second = Random(seed).sample(_EVENTS, 2)
    values = [hashlib.sha384(name.encode()).digest() for name in (first, second)]

    def chain(values: list[bytes]) -> str:
        rtmr = bytes(48)
        for value in values:
            rtmr = extend_rtmr(rtmr, value)
        return rtmr.hex()

    wrong = {
        chain(values[::-1]): "That is the other order: the first extension is hashed first.",
        _sha(values[0] + values[1]): "The register starts with 48 zero bytes, and they count.",
        _sha(bytes(48) + values[0] + values[1]): "Each extension is a SHA-384 of its own.",
        chain(values[:1]): "That is the register after the first extension.",
        chain([first.encode(), second.encode()]): "Extend by the digests, not by the texts.",
    }

    def hint(answer: Any) -> str:
        general = "Call extend_rtmr(register, value) twice, beginning with bytes(48), then .hex()."
        return wrong.get(str(answer).strip().casefold(), general)

    question = (
        f'A guest extends RTMR 0, which is zero, by SHA-384 of the text "{first}" and then by '
        f'SHA-384 of the text "{second}". RTMR 0 afterwards, as 96 hex digits?'
    )
    return Variant(question, chain(values), hint)


def report_offset(gpaw: int, seed: int) -> Variant:
    """Where in the report does a value stand?"""
    number = Random(seed).randint(-1, 3)
    name = "MRTD" if number < 0 else f"RTMR {number}"
    built = build(Recipe(gpaw=gpaw))
    value = bytes.fromhex(built.mrtd())
    if number >= 0:
        value = extend_rtmr(bytes(48), built.extend_rtmr(number, SMALL_IMAGE[0].gpa))
    place = built.report().find(value)

    def hint(answer: Any) -> str:
        if answer == place - TD_INFO:
            return "That is its offset in TDINFO, which is the last of the three parts."
        return (
            "Take the layout table above: sizes of the parts before TDINFO, then of the fields "
            "before the one you want; or let report.find(value) tell."
        )

    question = f"At which byte offset of the 1024 bytes of a report does {name} begin?"
    return Variant(question, place, hint)


def flipped_firmware(_gpaw: int, seed: int) -> Variant:
    """Measure a firmware image with one byte inverted."""
    image = small_firmware()
    offset = Random(seed).randrange(len(image) - 0x400)
    changed = parse(flipped(image, offset))

    def hint(answer: Any) -> str:
        given = str(answer).strip().casefold()
        if given == launch(parse(image)):
            return f"That is the file as it is; byte {offset:#x} lies in content that is measured."
        if given == launch(changed, PER_SECTION):
            return "That is the other order of the calls."
        if given in (_sha(flipped(image, offset)), _sha(image)):
            return "That is the hash of the file. MRTD is the hash of calls: parse it, launch it."
        return "flipped(image, offset) gives the file, parse its sections, launch the MRTD."

    question = (
        f"Byte {offset:#x} of the small firmware file is inverted, and a host adds it page by "
        "page. MRTD, as 96 hex digits?"
    )
    return Variant(question, launch(changed), hint)


def reordered_firmware(_gpaw: int, seed: int) -> Variant:
    """Measure the sections of a firmware image in another order."""
    image, draw = small_firmware(), Random(seed)
    firmware = parse(image)
    first, second = sorted(draw.sample(range(len(firmware.sections)), 2))
    order = list(range(len(firmware.sections)))
    order[first], order[second] = second, first
    other = in_order(firmware, tuple(order))

    def hint(answer: Any) -> str:
        given = str(answer).strip().casefold()
        if given == launch(parse(swapped(image, first, second))):
            return (
                "That is another file: its metadata changed, and they are measured with the code. "
                "Here the file is the same, and only its host does things in another order."
            )
        if given == launch(firmware):
            return "That is the order of the metadata. Each TDH.MEM.PAGE.ADD is hashed in its turn."
        return "in_order(firmware, order) gives the sections in that order; launch them."

    listed = ", ".join(map(str, order))
    question = (
        f"A VMM reads the small firmware file, but adds its sections in the order {listed} "
        "(numbers of the table), page by page. MRTD, as 96 hex digits?"
    )
    return Variant(question, launch(other), hint)


_MAKERS: tuple[Callable[[int, int], Variant], ...] = (
    bytes_hashed,
    digests_of_one_image,
    seen_changes,
    own_mrtd,
    unseen_byte,
    own_rtmr,
    report_offset,
    flipped_firmware,
    reordered_firmware,
)

EXERCISES = tuple(Exercise(f"11.{n}", make) for n, make in enumerate(_MAKERS, start=1))
