"""Ed25519 keys of signed runs: generate, load, sign, check.

The trainer holds the secret key and signs every document that it commits. Clients with the run's public key reject
unsigned documents. The package `cryptography` is needed only where a key is used.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubsync.errors import ConfigError, Untrusted

SIGNING_KEY_VARIABLE = "HUBSYNC_SIGNING_KEY"
PUBLIC_KEY_VARIABLE = "HUBSYNC_PUBLIC_KEY"

_CONTEXT = b"hubsync/1 document\0"  # a signature made with this key elsewhere is not valid for a document of a run
_HEX_KEY = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class PublicKey:
    """Checks documents of a run. `hex` holds its 64 hex digits, the form that replicas are given."""

    hex: str

    @classmethod
    def load(cls, source: str) -> PublicKey:
        """Load from 64 hex digits or a file that holds them. ConfigError for anything else."""
        text = source.strip() if _HEX_KEY.fullmatch(source.strip()) else _read(source, "public key").strip()
        if not _HEX_KEY.fullmatch(text):
            raise ConfigError(
                f"{source!r:.80} is not a public key: it has 64 hex digits, as `hubsync keygen` prints them"
            )
        return cls(text)

    def check(self, name: str, content: bytes, signature: object) -> None:
        """Raise Untrusted unless `signature` (hex) is this key's for a document of this name and content."""
        try:
            key = _ed25519().Ed25519PublicKey.from_public_bytes(bytes.fromhex(self.hex))
            key.verify(bytes.fromhex(str(signature)), _CONTEXT + name.encode() + b"\0" + content)
        except (_invalid(), ValueError):
            what = "is not signed" if signature is None else "is not signed by the key of this run"
            raise Untrusted(f"{name} {what} ({self.hex[:12]}...): it was not used") from None


@dataclass(frozen=True, repr=False)
class SigningKey:
    """Signs documents of a run. Its repr does not contain the secret."""

    _secret: bytes

    @classmethod
    def generate(cls) -> SigningKey:
        return cls(os.urandom(32))

    @classmethod
    def load(cls, source: str) -> SigningKey:
        """Load from a file that `hubsync keygen` wrote, or from its content (secrets in environment variables)."""
        text = source.strip() if _HEX_KEY.fullmatch(source.strip()) else _read(source, "signing key").strip()
        if not _HEX_KEY.fullmatch(text):
            raise ConfigError("the signing key is not one that `hubsync keygen FILE` made: name that file")
        return cls(bytes.fromhex(text))

    def save(self, path: Path) -> None:
        """Write it to a new file that only its owner can read. ConfigError if the file exists."""
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            raise ConfigError(
                f"{path} exists: a key that signs runs is never overwritten, choose another name"
            ) from None
        with os.fdopen(descriptor, "w") as file:
            file.write(self._secret.hex() + "\n")

    @property
    def public(self) -> PublicKey:
        return PublicKey(self._key().public_key().public_bytes_raw().hex())

    def sign(self, name: str, content: bytes) -> str:
        """Signature (hex) of a document."""
        return self._key().sign(_CONTEXT + name.encode() + b"\0" + content).hex()

    def _key(self) -> Any:
        return _ed25519().Ed25519PrivateKey.from_private_bytes(self._secret)

    def __repr__(self) -> str:
        return f"SigningKey(of {self.public.hex[:12]}...)"


def _read(source: str, what: str) -> str:
    try:
        return Path(source).expanduser().read_text()
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"the {what} cannot be read: there is no such file, or it holds none") from None


def _ed25519() -> Any:
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise ConfigError("signed runs need the package cryptography: pip install cryptography") from None
    return ed25519


def _invalid() -> type[Exception]:
    from cryptography.exceptions import InvalidSignature

    return InvalidSignature
