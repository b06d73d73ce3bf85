"""What somebody finds who has a probe on the memory bus, and what they can put back.

    held = probe(memory, hpa)        # ciphertext, TD-owner bit, MAC, poison
    inject(memory, hpa, held)        # as if the memory had held it all the time

A probe has no key and no KeyID, and nothing stops it: that it can only put back what it has seen
is the work of cipher and MAC.

Differs: our sources say that lines have a TD-owner bit and integrity metadata, but not how these
are stored and checked. Here a MAC covers key, address and ciphertext, and nothing says when a line
was written.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from tdxlab.memory import KEY, LINE_SIZE, OWNED, POISON, Memory

_MAC_BYTES = 8
#: The number of a key that nobody has: what a line with a wrong MAC is under.
_NOBODYS = KEY


class Line(NamedTuple):
    """One line as the memory holds it. mac: b"" on a machine whose lines have none."""

    ciphertext: bytes
    td_owned: bool
    mac: bytes
    poisoned: bool = False


def probe(memory: Memory, hpa: int) -> Line:
    """The line at `hpa`, 64-byte aligned, as the memory holds it."""
    tag = memory.tag(hpa)
    held = memory.ciphertext(hpa)
    mac = _mac(hpa, tag & KEY, held) if memory.has_mac else b""
    return Line(held, bool(tag & OWNED), mac, bool(tag & POISON))


def inject(memory: Memory, hpa: int, line: Line) -> None:
    """Let the memory hold `line` at `hpa`, 64-byte aligned.

    Who reads it later finds the MAC to be right or not. Refuses an address without RAM, or one that
    is not a line's: ValueError.
    """
    memory.require_ram(hpa, LINE_SIZE)
    if hpa % LINE_SIZE:
        raise ValueError(f"{hpa:#x} is not the address of a line; give a multiple of {LINE_SIZE}")
    key = _key_of(memory, hpa, line)
    data = line.ciphertext
    if key and memory.encrypted:
        data = memory.cipher.decipher(hpa, key, data)
    tag = key | OWNED * line.td_owned | POISON * line.poisoned
    memory.put_line(hpa, data, tag)


def _key_of(memory: Memory, hpa: int, line: Line) -> int:
    """The key under which the MAC is right. Without MACs any would do: nobody's."""
    for tag in memory.current_tags():
        if memory.has_mac and _mac(hpa, tag & KEY, line.ciphertext) == line.mac:
            return tag & KEY
    return _NOBODYS


def _mac(hpa: int, key: int, ciphertext: bytes) -> bytes:
    seed = b"%d:%d:" % (hpa, key)
    return hashlib.blake2b(seed + ciphertext, digest_size=_MAC_BYTES).digest()
