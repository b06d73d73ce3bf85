"""Attacks on the bytes: reading and writing memory, from software and with a probe on the bus."""

from __future__ import annotations

from tdxlab import dram
from tdxlab.abi import leaves as abi
from tdxlab.abi.outcome import GuestOutcome
from tdxlab.arch import SIZE_2M, table_index
from tdxlab.attacks.stage import DATA, DATA_GPA, HOST_KEYID, SECRET, Stage
from tdxlab.attacks.verdict import (
    CONTROL,
    CORRUPTION,
    DENIAL,
    ENCRYPTION,
    LEAKED,
    MAC,
    NOTHING,
    OWNER_BIT,
    REPLAY,
    TRAFFIC,
    Verdict,
)
from tdxlab.memory import LINE_SIZE
from tdxlab.seam.rules import MAPPED_BITS
from tdxlab.seam.sept import make_leaf

#: A 4 KiB leaf that is mapped, readable, writable and executable.
_MAPPED = make_leaf(MAPPED_BITS, 0)
#: What the host would like the victim to read.
FORGED = b"Your private key is now 0000000000000000, and everybody knows it"
#: Another line that the victim writes in the course of some attacks.
_NEWS = b"The key has changed; whoever still uses the old one is too late."


def read_private(stage: Stage) -> Verdict:
    """Read the victim's page: as the memory holds it, and under a KeyID of the host's own."""
    raw = stage.load(stage.data_hpa)
    stage.load(stage.data_hpa, keyid=HOST_KEYID)
    if any(move.result == SECRET for move in stage.moves):
        return Verdict("", LEAKED, "the bytes are those that the victim wrote")
    assert isinstance(raw, bytes)
    return Verdict(ENCRYPTION, NOTHING, f"{_alike(raw, SECRET)} of 64 bytes are the victim's")


def compare_ciphertext(stage: Stage) -> Verdict:
    """Read the ciphertext again and again, to learn when the victim writes, and when it writes
    what was there before.
    """
    seen = [stage.load(stage.data_hpa)]
    for line in (_NEWS, SECRET):
        stage.guest_write(line)
        seen.append(stage.load(stage.data_hpa))
    if seen[0] != seen[1] and seen[0] == seen[2]:
        return Verdict("", TRAFFIC, "the third ciphertext is the first one again")
    return Verdict(ENCRYPTION, NOTHING, "no two ciphertexts are equal")


def write_private(stage: Stage) -> Verdict:
    """Write into the victim's page, and let the victim read it."""
    stage.store(stage.data_hpa, FORGED)
    return _judge_forgery(stage, stage.guest_read(), FORGED, CONTROL)


def replay_in_software(stage: Stage) -> Verdict:
    """Keep the ciphertext of the victim's line, and write it back after the victim has changed the
    line.
    """
    old = stage.load(stage.data_hpa)
    stage.guest_write(_NEWS)
    if isinstance(old, bytes):
        stage.store(stage.data_hpa, old)
    return _judge_forgery(stage, stage.guest_read(), SECRET, REPLAY)


def overwrite_secure_ept(stage: Stage) -> Verdict:
    """Write an entry of one's own into a page of the victim's Secure EPT."""
    table = stage.victim.tables[DATA_GPA & -SIZE_2M, 1]
    entry = stage.spare[0] | _MAPPED
    stage.store(table + 8 * table_index(DATA_GPA, 0), entry.to_bytes(8, "little"))
    if stage.machine.module.halted:
        return Verdict(OWNER_BIT, DENIAL, f"the module halts: {stage.machine.module.halted}")
    stage.seamcall(abi.TDH_MEM_TRACK, rcx=stage.tdr)
    stage.kick()
    stage.enter()
    found = stage.guest_read()
    if found != SECRET:
        return Verdict("", CONTROL, "the CPU walks to the host's page")
    return Verdict(OWNER_BIT, NOTHING, "the victim reads its own")


# -- with a probe


def replay_on_the_bus(stage: Stage) -> Verdict:
    """With a probe: copy the victim's line with all its metadata, and put it back later."""
    old = stage.probe(stage.data_hpa)
    stage.guest_write(_NEWS)
    stage.inject(stage.data_hpa, old)
    return _judge_forgery(stage, stage.guest_read(), SECRET, REPLAY)


def splice_on_the_bus(stage: Stage) -> Verdict:
    """With a probe: copy a line of the victim's to another place in its memory."""
    dots = stage.data_hpa + 32 * LINE_SIZE
    stage.inject(stage.data_hpa, stage.probe(dots))
    found = stage.guest_read()
    moved = DATA[32 * LINE_SIZE : 33 * LINE_SIZE]
    if found == moved:
        return Verdict("", CONTROL, "the victim reads the line from the other place")
    return _judge_forgery(stage, found, None, CONTROL)


def forge_on_the_bus(stage: Stage) -> Verdict:
    """With a probe: flip one bit of the victim's ciphertext, and leave the owner bit as it is."""
    held = stage.probe(stage.data_hpa)
    flipped = bytes([held.ciphertext[0] ^ 1]) + held.ciphertext[1:]
    stage.inject(stage.data_hpa, held._replace(ciphertext=flipped))
    return _judge_forgery(stage, stage.guest_read(), None, CONTROL)


def _judge_forgery(
    stage: Stage, found: bytes | GuestOutcome, forged: bytes | None, gain: str
) -> Verdict:
    """What it is worth that the victim read `found` in the place of its secret."""
    if found == forged:
        return Verdict("", gain, "the victim reads what was put there, and notices nothing")
    return judge_read(stage, found, stage.data_hpa, ENCRYPTION)


def judge_read(stage: Stage, found: bytes | GuestOutcome, hpa: int, otherwise: str) -> Verdict:
    """What it is worth that the victim read `found` from the line at `hpa`, where it wrote its
    secret. otherwise: what stopped the attack if it read just that.
    """
    if found == SECRET:
        return Verdict(otherwise, NOTHING, "the victim reads its own bytes")
    if isinstance(found, bytes):
        right = _alike(found, SECRET)
        return Verdict("", CORRUPTION, f"the victim reads garbage, {right} of 64 bytes are right")
    line = dram.probe(stage.machine.memory, hpa)
    stopper = MAC if line.td_owned else OWNER_BIT
    return Verdict(stopper, DENIAL, "a machine check at the victim's read ends the TD")


def _alike(some: bytes, other: bytes) -> int:
    """Bytes that are equal at the same place."""
    return sum(a == b for a, b in zip(some, other, strict=True))
