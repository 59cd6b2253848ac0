"""Names of people and files become keyed hashes: one key, one pseudonym; without the key none is undone."""

import hashlib
import hmac
import os
import unicodedata
from pathlib import Path

from ccmdist.console import log
from ccmdist.errors import ShardError

MIN_KEY_BYTES = 16
NUM_HEX_DIGITS = 16


class Pseudonyms:
    """Pseudonyms under one key."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    @classmethod
    def read(cls, key_file: Path) -> "Pseudonyms":
        """With the key in a file.

        Raises:
            ShardError: If it is missing or too short to keep a secret.
        """
        try:
            key = key_file.read_bytes()
        except OSError as error:
            remedy = f"make one with `(umask 077; head -c 32 /dev/urandom > {key_file})`"
            raise ShardError(f"{key_file}: {error.strerror}", remedy) from None
        if len(key) < MIN_KEY_BYTES:
            raise ShardError(
                f"{key_file}: a key of {len(key)} bytes, expected at least {MIN_KEY_BYTES}", "make a longer one"
            )
        if key_file.stat().st_mode & 0o077:
            log.warning("%s: others on this machine can read the key of the pseudonyms; `chmod 600` it", key_file)
        return cls(key)

    @classmethod
    def read_or_make(cls, key_file: Path) -> "Pseudonyms":
        """With the key in a file that is made, readable by its owner only, where there is none."""
        key_file.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(key_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            return cls.read(key_file)
        with os.fdopen(descriptor, "wb") as file:
            file.write(os.urandom(32))
            file.flush()
            os.fsync(descriptor)
        log.info("%s: made the key of the pseudonyms; keep it secret, and keep it to add frames later", key_file)
        return cls.read(key_file)

    def subject(self, name: str) -> str:
        """The pseudonym of a person."""
        return f"s-{self._hash('subject', canonical(name))}"

    def sample(self, name: str, frame: str) -> str:
        """The key of a sample: its subject's pseudonym, and a hash of the file that the frame came from."""
        return f"{self.subject(name)}-{self._hash('frame', canonical(name), frame)}"

    def digest(self, *parts: str) -> str:
        """A hash of texts that says nothing about them without the key."""
        return self._hash("digest", *parts)

    def _hash(self, *parts: str) -> str:
        # Lengths keep ("ab", "c") and ("a", "bc") apart.
        text = "".join(f"{len(part)}:{part}" for part in parts)
        return hmac.new(self._key, text.encode(), hashlib.sha256).hexdigest()[:NUM_HEX_DIGITS]


def canonical(name: str) -> str:
    """One spelling of a person's name or number: case, spaces around it and ways to encode accents do not count.

    Two spellings that are taken for two people could put one person into train and test; the reverse does no harm.
    """
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())
