"""Stored data of a local Hub, in one directory: names in SQLite, content in files named by their hash."""

from __future__ import annotations

import json
import os
import secrets
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from datetime import datetime, timezone
from pathlib import Path

from .xet import EMPTY_FILE, Chunk, MalformedError, Segment, XetShard, check_file, check_xorb

_SCHEMA = """
pragma journal_mode = wal;
pragma synchronous = normal;
create table if not exists secret (value text);
create table if not exists bucket (id text primary key, private int, created text, updated text);
create table if not exists file (bucket text, path text, hash text, size int, mtime int, uploaded text, type text,
                                 primary key (bucket, path)) without rowid;
create table if not exists model (id text, path text, hash text, size int, sha256 text,
                                  primary key (id, path)) without rowid;
create table if not exists content (hash text primary key, size int, segments text) without rowid;
create table if not exists xorb (hash text primary key, chunks text) without rowid;
create table if not exists chunk (hash text primary key, shard text) without rowid;
"""


@dataclass(frozen=True)
class BucketRow:
    id: str
    private: bool
    created: str
    updated: str
    files: int
    size: int


@dataclass(frozen=True)
class FileRow:
    path: str
    hash: str
    size: int
    mtime: int  # milliseconds since 1970
    uploaded: str
    type: str | None


@dataclass(frozen=True)
class ModelFile:
    path: str
    hash: str
    size: int
    sha256: str


_FILE = "path, hash, size, mtime, uploaded, type"


class Store:
    """All state of one local Hub. Thread-safe; opening the same directory again continues where it stopped."""

    def __init__(self, root: Path) -> None:
        self._xorbs, self._shards = root / "xorbs", root / "shards"
        for directory in (self._xorbs, self._shards):
            directory.mkdir(parents=True, exist_ok=True)
        self._lock = threading.RLock()
        self._db = sqlite3.connect(root / "hub.db", check_same_thread=False, isolation_level=None)
        self._db.executescript(_SCHEMA)
        with self.transaction():
            if not self._rows("select value from secret"):
                self._rows("insert into secret values (?)", secrets.token_hex(32))
        self.secret = bytes.fromhex(self._rows("select value from secret")[0][0])

    def close(self) -> None:
        with self._lock:
            self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """A transaction: other threads see all changes inside, or none."""
        with self._lock:
            self._db.execute("begin immediate")
            try:
                yield
            except BaseException:
                self._db.execute("rollback")
                raise
            self._db.execute("commit")

    # --- buckets and names --------------------------------------------------------------------------

    def create_bucket(self, bucket: str, private: bool) -> bool:
        """False if it exists."""
        with self._lock:
            before = self._db.total_changes
            self._rows("insert or ignore into bucket values (?, ?, ?, ?)", bucket, private, now(), now())
            return self._db.total_changes > before

    def bucket(self, bucket: str) -> BucketRow | None:
        rows = self._rows("select id, private, created, updated from bucket where id = ?", bucket)
        if not rows:
            return None
        totals = self._rows("select count(*), coalesce(sum(size), 0) from file where bucket = ?", bucket)[0]
        return BucketRow(rows[0][0], bool(rows[0][1]), rows[0][2], rows[0][3], *totals)

    def buckets(self, namespace: str) -> list[BucketRow]:
        ids = [row[0] for row in self._rows("select id from bucket order by id")]
        found = (self.bucket(bucket) for bucket in ids if bucket.startswith(namespace + "/"))
        return [row for row in found if row is not None]

    def delete_bucket(self, bucket: str) -> None:
        with self.transaction():
            self._rows("delete from file where bucket = ?", bucket)
            self._rows("delete from bucket where id = ?", bucket)

    def touch(self, bucket: str) -> str:
        """Note that a bucket has changed. Returns the time."""
        time = now()
        self._rows("update bucket set updated = ? where id = ?", time, bucket)
        return time

    def file(self, bucket: str, path: str) -> FileRow | None:
        rows = self._rows(f"select {_FILE} from file where bucket = ? and path = ?", bucket, path)
        return FileRow(*rows[0]) if rows else None

    def files(self, bucket: str, prefix: str, after: str) -> list[FileRow]:
        """Files whose path starts with the letters of `prefix` and sorts after `after`."""
        rows = self._rows(
            f"select {_FILE} from file where bucket = ? and path > ? and substr(path, 1, ?) = ? order by path",
            bucket,
            after,
            len(prefix),
            prefix,
        )
        return [FileRow(*row) for row in rows]

    def write_file(self, bucket: str, path: str, content: str, mtime: int, type_: str | None) -> bool:
        """Point a path at content; False if there is no such content."""
        size = self.content_size(content)
        if size is None:
            return False
        row = (bucket, path, content, size, mtime, now(), type_)
        self._rows("insert or replace into file values (?, ?, ?, ?, ?, ?, ?)", *row)
        return True

    def delete_file(self, bucket: str, path: str) -> bool:
        """False if there is no such path."""
        with self._lock:
            before = self._db.total_changes
            self._rows("delete from file where bucket = ? and path = ?", bucket, path)
            return self._db.total_changes > before

    def add_model(self, model: str, bucket: str, sha256: Mapping[str, str]) -> None:
        """Make a model repository of files of a bucket. KeyError if one does not exist."""
        for path, digest in sha256.items():
            file = self.file(bucket, path)
            if file is None:
                raise KeyError(path)
            self._rows("insert or replace into model values (?, ?, ?, ?, ?)", model, path, file.hash, file.size, digest)

    def model(self, model: str) -> dict[str, ModelFile]:
        """Path -> file; empty if there is no such repository."""
        rows = self._rows("select path, hash, size, sha256 from model where id = ?", model)
        return {row[0]: ModelFile(*row) for row in rows}

    def holds(self, bucket: str, content: str) -> bool:
        """Whether some path of the bucket has this content."""
        return bool(self._rows("select 1 from file where bucket = ? and hash = ? limit 1", bucket, content))

    # --- content ------------------------------------------------------------------------------------

    def content_size(self, content: str) -> int | None:
        if content == EMPTY_FILE:
            return 0
        rows = self._rows("select size from content where hash = ?", content)
        return rows[0][0] if rows else None

    def segments(self, content: str) -> list[Segment] | None:
        rows = self._rows("select segments from content where hash = ?", content)
        return [Segment(*segment) for segment in json.loads(rows[0][0])] if rows else None

    def chunks(self, xorb: str) -> list[Chunk] | None:
        rows = self._rows("select chunks from xorb where hash = ?", xorb)
        return [Chunk(*chunk) for chunk in json.loads(rows[0][0])] if rows else None

    def save_xorb(self, xorb: str, chunks: list[Chunk], data: bytes) -> bool:
        """False if it is already there. MalformedError if its content has another hash."""
        if self.chunks(xorb) is not None:
            return False
        check_xorb(xorb, chunks)
        _save(self._xorbs / xorb, data)
        rows = json.dumps([astuple(chunk) for chunk in chunks])
        self._rows("insert or ignore into xorb values (?, ?)", xorb, rows)
        return True

    def read_xorb(self, xorb: str, start: int, end: int) -> bytes:
        with (self._xorbs / xorb).open("rb") as file:
            file.seek(start)
            return file.read(end - start)

    def xorb_bytes(self, xorb: str) -> int | None:
        """Size of the serialized xorb; None if it is unknown."""
        path = self._xorbs / xorb
        return path.stat().st_size if self.chunks(xorb) is not None else None

    def save_shard(self, shard: XetShard) -> None:
        """Register files; MalformedError if a file does not fit the xorbs it is made of."""
        for xorb, sizes in shard.xorbs.items():
            if [chunk.size for chunk in self._known_chunks(xorb)] != sizes:
                raise MalformedError(f"shard: xorb {xorb} has other chunks")
        for file, segments in shard.files.items():
            check_file(file, [chunk for segment in segments for chunk in self._chunks_of(segment)])
        name = secrets.token_hex(16)
        _save(self._shards / name, shard.answer)
        with self.transaction():
            self._db.executemany("insert or ignore into content values (?, ?, ?)", _content_rows(shard))
            self._db.executemany("insert or ignore into chunk values (?, ?)", ((c, name) for c in shard.findable))

    def shard_with(self, chunk: str) -> bytes | None:
        """Answer to the look-up of a chunk."""
        rows = self._rows("select shard from chunk where hash = ?", chunk)
        return (self._shards / rows[0][0]).read_bytes() if rows else None

    def _known_chunks(self, xorb: str) -> list[Chunk]:
        chunks = self.chunks(xorb)
        if chunks is None:
            raise MalformedError(f"shard: unknown xorb {xorb}")
        return chunks

    def _chunks_of(self, segment: Segment) -> list[Chunk]:
        chunks = self._known_chunks(segment.xorb)
        found = chunks[segment.start : segment.end]
        inside = 0 <= segment.start < segment.end <= len(chunks)
        if not inside or sum(chunk.size for chunk in found) != segment.size:
            raise MalformedError(f"shard: a file refers to bytes that xorb {segment.xorb} does not have")
        return found

    def _rows(self, sql: str, *values: object) -> list[tuple]:
        with self._lock:
            return self._db.execute(sql, values).fetchall()


def now() -> str:
    return timestamp(datetime.now(timezone.utc).timestamp() * 1000)


def timestamp(milliseconds: float) -> str:
    """ISO 8601 with milliseconds, as the Hub writes it."""
    moment = datetime.fromtimestamp(milliseconds / 1000, timezone.utc)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def _content_rows(shard: XetShard) -> Iterable[tuple[str, int, str]]:
    for content, segments in shard.files.items():
        yield content, sum(s.size for s in segments), json.dumps([astuple(s) for s in segments])


def _save(path: Path, data: bytes) -> None:
    staged = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    staged.write_bytes(data)
    os.replace(staged, path)
