"""AES in XTS mode as memory encryption: the bytes that a host or a bus probe would see.

    machine.memory.cipher = AesXts()

Each key number has a key of its own. The tweak is the address of the line, so the same bytes look
different at every address, and equal whenever they stand at the same one. Nothing is enciphered
before somebody looks.

Differs: real keys are random, made by the processor and known to nobody; these are computed from a
seed, so that runs repeat, and keep no secret. Length of the keys and form of the tweak are chosen
here; our sources do not say them.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import XTS

#: Bytes that XTS enciphers as one: a change of one of them changes all of them.
BLOCK = 16
_TWEAK_BYTES = 16


class AesXts:
    """A `tdxlab.memory.Cipher`. seed: other seeds, other keys."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def encipher(self, hpa: int, key: int, line: bytes) -> bytes:
        """The line as the memory holds it."""
        return _cipher(self.seed, key, hpa).encryptor().update(line)

    def decipher(self, hpa: int, key: int, line: bytes) -> bytes:
        """The line as a reader with the key gets it."""
        return _cipher(self.seed, key, hpa).decryptor().update(line)


def _cipher(seed: int, key: int, hpa: int) -> Cipher[XTS]:
    tweak = hpa.to_bytes(_TWEAK_BYTES, "little")
    return Cipher(AES(_key(seed, key)), XTS(tweak))


@lru_cache(maxsize=256)
def _key(seed: int, key: int) -> bytes:
    """The 32 bytes of one key: AES-128 for the data, and AES-128 for the tweak."""
    return hashlib.sha256(b"%d:%d" % (seed, key)).digest()
