"""Attacks as tables: what stopped them, move by move, and who reads what of the victim's page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from typing import NamedTuple

from tdxlab import views
from tdxlab.attacks import ATTACKS, LACKS, Report, attack
from tdxlab.attacks.command import move_text
from tdxlab.attacks.stage import DATA, HOST_KEYID, SECRET, Move, Stage, answer_text
from tdxlab.attacks.verdict import DENIAL, MECHANISMS, NOTHING, REPLAY, TRAFFIC
from tdxlab.memory import KEY, LINE_SIZE, OWNED, POISON, MachineCheck, Memory
from tdxlab.study.aes_xts import BLOCK, AesXts
from tdxlab.study.undone import undone

NOT_STOPPED = "not stopped"
LINES = len(DATA) // LINE_SIZE

# -- whose a line is

VICTIM, HOSTS, OTHERS, POISONED, FORGED = "victim's", "host's", "another key", "poisoned", "forged"


class AttackRow(NamedTuple):
    """What came of one attack. the_host_has: what it gained all the same."""

    attack: str
    stopped_by: str
    the_host_has: str
    evidence: str


class MoveRow(NamedTuple):
    """One move of an attack."""

    move: int
    who: str
    what: str
    answer: str


class MechanismRow(NamedTuple):
    """What one mechanism stops."""

    mechanism: str
    attacks: int
    names: str


class StopperRow(NamedTuple):
    """What stops attacks, and how many of them leave the host with what all the same."""

    stopped_by: str
    nothing: int
    denial_of_service: int
    traffic_analysis: int
    replay: int


class ReaderRow(NamedTuple):
    """Somebody who reads the line with the secret. alike: of its 64 bytes, those that are the
    victim's. sees: the first of them in hex, or the fault.
    """

    reader: str
    keyid: str
    sees: str
    alike: int


class BlockRow(NamedTuple):
    """How ciphertexts of one line differ, 16 bytes at a time. changed: bytes of the block that are
    not those of the first ciphertext.
    """

    line: str
    block_0: int
    block_1: int
    block_2: int
    block_3: int


class LackRow(NamedTuple):
    """An attack that something stops, but not on a stage that lacks what is named in `without`."""

    attack: str
    stopped_by: str
    without: str
    the_host_has: str


@cache
def try_attack(name: str, gpaw: int, lacks: str = "nothing") -> Report:
    """What comes of an attack under AES-XTS; each is tried once."""
    return attack(name, gpaw=gpaw, lacks=lacks, cipher=AesXts())


def attack_rows(names: Iterable[str], gpaw: int, lacks: str = "nothing") -> list[AttackRow]:
    """A row for each attack."""
    reports = [try_attack(name, gpaw, lacks) for name in names]
    return [
        AttackRow(report.name, report.stopped_by or NOT_STOPPED, report.gained, report.evidence)
        for report in reports
    ]


def all_rows(gpaw: int) -> list[AttackRow]:
    """A row for every attack there is."""
    return attack_rows(ATTACKS, gpaw)


def move_rows(moves: Sequence[Move]) -> list[MoveRow]:
    """The moves of one attack."""
    return [
        MoveRow(number, move.actor, move_text(move), move.answer)
        for number, move in enumerate(moves, 1)
    ]


def mechanism_rows(gpaw: int) -> list[MechanismRow]:
    """What each mechanism stops, and what nothing does."""
    rows = all_rows(gpaw)
    found = []
    for mechanism in (*MECHANISMS, NOT_STOPPED):
        names = [row.attack for row in rows if row.stopped_by == mechanism]
        found.append(MechanismRow(mechanism, len(names), ", ".join(names)))
    return found


def stopper_rows(gpaw: int) -> list[StopperRow]:
    """Mechanisms in the order of `MECHANISMS`, with their attacks counted by what is gained."""
    counts = Counter((row.stopped_by, row.the_host_has) for row in all_rows(gpaw))
    gains = (NOTHING, DENIAL, TRAFFIC, REPLAY)
    return [
        StopperRow(name, *(counts[name, gain] for gain in gains))
        for name in (*MECHANISMS, NOT_STOPPED)
    ]


def lack_rows(gpaw: int) -> list[LackRow]:
    """The attacks that succeed where something is missing, and what stops them otherwise."""
    rows = []
    for lacks in list(LACKS)[1:]:
        for name in ATTACKS:
            whole, without = try_attack(name, gpaw), try_attack(name, gpaw, lacks)
            if whole.stopped_by and not without.stopped_by:
                rows.append(LackRow(name, whole.stopped_by, lacks, without.gained))
    return rows


# -- who reads what


def peek(stage: Stage, hpa: int, keyid: int) -> bytes | MachineCheck:
    """What a reader with a KeyID would get of the line at `hpa`; nothing changes by it."""
    with undone(stage.machine):
        try:
            return stage.machine.memory.read(hpa, LINE_SIZE, keyid)
        except MachineCheck as fault:
            return fault


def reader_rows(stage: Stage) -> list[ReaderRow]:
    """Everybody who may read the line with the secret."""
    hpa, memory = stage.data_hpa, stage.machine.memory
    readers = [
        ("the victim", hex(stage.keyid), peek(stage, hpa, stage.keyid)),
        ("the host", "0x0", peek(stage, hpa, 0)),
        ("the host", hex(HOST_KEYID), peek(stage, hpa, HOST_KEYID)),
        ("another TD", hex(stage.keyid + 1), peek(stage, hpa, stage.keyid + 1)),
        ("a probe on the bus", "none", memory.ciphertext(hpa)),
    ]
    return [ReaderRow(who, keyid, answer_text(seen), _alike(seen)) for who, keyid, seen in readers]


def _alike(seen: bytes | MachineCheck) -> int:
    if isinstance(seen, MachineCheck):
        return 0
    return sum(a == b for a, b in zip(seen, SECRET, strict=True))


def block_rows(stage: Stage) -> list[BlockRow]:
    """Ciphertexts that differ from that of the secret's line: with one byte changed, at another
    address, under another key.
    """
    cipher, hpa, key = stage.machine.memory.cipher, stage.data_hpa, _key(stage)
    first = cipher.encipher(hpa, key, SECRET)
    changed = SECRET[:20] + bytes([SECRET[20] ^ 1]) + SECRET[21:]
    elsewhere = cipher.encipher(hpa + LINE_SIZE, key, SECRET)
    return [
        BlockRow("the same again", *block_differences(stage, SECRET)),
        BlockRow("byte 20 changed", *block_differences(stage, changed)),
        BlockRow("at the next line's address", *_differences(first, elsewhere)),
        BlockRow("with another key", *_differences(first, cipher.encipher(hpa, key + 1, SECRET))),
    ]


def block_differences(stage: Stage, line: bytes) -> list[int]:
    """For each 16 bytes of the secret's line: how many bytes of the ciphertext would be others if
    `line` stood there.
    """
    cipher, hpa, key = stage.machine.memory.cipher, stage.data_hpa, _key(stage)
    return _differences(cipher.encipher(hpa, key, SECRET), cipher.encipher(hpa, key, line))


def _key(stage: Stage) -> int:
    return stage.machine.memory.tag(stage.data_hpa) & KEY


def _differences(one: bytes, other: bytes) -> list[int]:
    return [
        sum(a != b for a, b in zip(one[place:][:BLOCK], other[place:][:BLOCK], strict=True))
        for place in range(0, LINE_SIZE, BLOCK)
    ]


# -- the present state of a stage


def held_page(memory: Memory, hpa: int) -> bytes:
    """The page as the memory holds it."""
    return b"".join(memory.ciphertext(hpa + place) for place in range(0, len(DATA), LINE_SIZE))


def owners(stage: Stage) -> list[str]:
    """Whose each line of the victim's data page is: who wrote it last, and whether it is sound."""
    memory = stage.machine.memory
    tags = memory.current_tags()
    return [
        _owner(memory.tag(stage.data_hpa + place), tags, stage.keyid)
        for place in range(0, len(DATA), LINE_SIZE)
    ]


def _owner(tag: int, tags: list[int], keyid: int) -> str:
    if tag & POISON:
        return POISONED
    if tag == tags[keyid]:
        return VICTIM
    if tag not in tags and tag & KEY == KEY:
        return FORGED
    return OTHERS if tag & OWNED else HOSTS


class PlaceRow(NamedTuple):
    """What the module, and the CPU, have of the victim's data page."""

    what: str
    value: str


def place_rows(stage: Stage) -> list[PlaceRow]:
    """The page's PAMT entry, its Secure EPT entry, the TLBs that lead to it, the victim's life."""
    machine, hpa = stage.machine, stage.data_hpa
    page = next((row for row in views.pamt_rows(machine) if row.hpa == hpa), None)
    owner = "nobody's" if page is None else f"{page.page_type} of {page.owner:#x}"
    entries = [row for row in views.sept_rows(machine, stage.tdr) if row.gpa == stage.data_gpa]
    state = next((row.state for row in entries if row.sept_level == 0), "FREE")
    lps = [
        str(lp)
        for lp in machine.cpu.lps
        if any(found.hpa == hpa for found in machine.cpu.tlbs[lp].values())
    ]
    life = views.td_info(machine, stage.tdr)
    return [
        PlaceRow("in the PAMT", owner),
        PlaceRow("Secure EPT entry of its GPA", state),
        PlaceRow("in the TLBs of LPs", ", ".join(lps) or "none"),
        PlaceRow("the victim", "dead" if life["fatal"] or machine.module.halted else "alive"),
    ]


def count_alike(stage: Stage) -> int:
    """Bytes of the data page that the memory holds as the victim wrote them."""
    held = held_page(stage.machine.memory, stage.data_hpa)
    return sum(a == b for a, b in zip(held, DATA, strict=True))
