"""A bucket with signed documents: `commit` signs each one, `read` rejects those without a valid signature.

Only documents (run.json, head, manifests) pass through these two methods. A manifest names every other object with its
size and SHA-256, so signatures of the documents cover the whole run. A signature also covers the document's name, so
one document cannot replace another.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from hubsync.errors import Untrusted
from hubsync.format.documents import SIGNATURE, canonical
from hubsync.format.keys import PublicKey, SigningKey

from .base import Bucket, Changes, Copied, Download, Stat, Upload


class SignedBucket(Bucket):
    """Signs and checks the documents of another bucket.

    Args:
        bucket: stores the bytes.
        key: a public key to read with. A signing key also writes.
    """

    def __init__(self, bucket: Bucket, key: PublicKey | SigningKey):
        self.address = bucket.address
        self._bucket = bucket
        self._signing = key if isinstance(key, SigningKey) else None
        self._public = key.public if isinstance(key, SigningKey) else key

    def commit(self, path: str, data: bytes) -> None:
        self._bucket.commit(path, self._signed(path, data))

    def expect(self, documents: Mapping[str, bytes]) -> None:
        self._bucket.expect({path: self._signed(path, data) for path, data in documents.items()})

    def _signed(self, path: str, data: bytes) -> bytes:
        """The same bytes each time: Ed25519 signatures depend on nothing else."""
        if self._signing is None:
            raise Untrusted(
                f"cannot write {path}: only the run's public key is set here. Set the signing key that `hubsync "
                "keygen` made"
            )
        document = json.loads(data)
        document[SIGNATURE] = self._signing.sign(path, canonical(document))
        return json.dumps(document, indent=1).encode()

    def read(self, paths: Sequence[str], *, max_bytes: int = 64 << 20) -> dict[str, bytes]:
        found = self._bucket.read(paths, max_bytes=max_bytes)
        for path, data in found.items():
            self._check(path, data)
        return found

    def beginnings(self, most: Mapping[str, int]) -> dict[str, bytes]:
        return self._bucket.beginnings(most)  # no documents: a part is not signed by itself

    def _check(self, path: str, data: bytes) -> None:
        try:
            document = json.loads(data)
            signature = document.pop(SIGNATURE, None)
            content = canonical(document)
        except (ValueError, AttributeError, TypeError, RecursionError):
            raise Untrusted(f"{path} was rejected: it is not a JSON document, so it has no signature") from None
        self._public.check(path, content, signature)

    def put(self, uploads: Sequence[Upload]) -> None:
        self._bucket.put(uploads)

    @property
    def lag(self) -> float:
        return self._bucket.lag

    def changes(self, paths: Sequence[str]) -> Changes:
        return self._bucket.changes(paths)

    def now(self) -> float:
        return self._bucket.now()

    def stat(self, paths: Sequence[str]) -> dict[str, Stat]:
        return self._bucket.stat(paths)

    def list(self, prefix: str = "", *, recursive: bool = True) -> Iterable[Stat]:
        return self._bucket.list(prefix, recursive=recursive)

    def fetch(self, downloads: Sequence[Download]) -> None:
        self._bucket.fetch(downloads)

    def copy_in(self, repo: str, revision: str, paths: Mapping[str, str]) -> dict[str, Copied] | None:
        return self._bucket.copy_in(repo, revision, paths)

    def delete(self, paths: Sequence[str]) -> None:
        self._bucket.delete(paths)
