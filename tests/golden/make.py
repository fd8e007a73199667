"""Makes the golden files with today's code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

from tests.golden import content
from tests.golden.content import CONFIG, KEY, LORA, NONCE, NOW, TABLE
from tests.golden.names import (
    ChainReader,
    ChainWriter,
    Compactor,
    Encoding,
    LocalBucket,
    Manifest,
    Position,
    Run,
    SignedBucket,
    Transition,
    VersionInfo,
    ViewBits,
    changed,
    digest_view,
    write_adapter,
    write_anchor,
    write_delta,
)

FILES = Path(__file__).parent / "files"


def make(folder: Path) -> None:
    """Write all golden files into an existing directory."""
    _make_parts(folder)
    _make_documents(folder)
    with _pinned():
        _make_run(folder / "run")
        _make_adapter_run(folder / "adapter")


def files_of(folder: Path) -> dict[str, bytes]:
    """Name in the folder -> bytes. Directories that a bucket leaves empty do not count."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def _make_parts(folder: Path) -> None:
    (folder / "parts").mkdir()
    for part in content.PARTS:
        data = write_delta(
            part.table,
            part.patch,
            Transition(content.RUN_ID, part.parent, part.position),
            rank=part.rank,
            encoding=Encoding.COMPACT if part.compact else Encoding.FAST,
            old=part.old,
        )
        (folder / part.path).write_bytes(data)


def _make_documents(folder: Path) -> None:
    (folder / "documents").mkdir()
    for name, document in content.DOCUMENTS.items():
        (folder / "documents" / name).write_bytes(document.dumps())
    bucket = SignedBucket(LocalBucket(folder / "signed", create=True), KEY)
    for name, document in content.SIGNED_DOCUMENTS.items():
        bucket.commit(name, document.dumps())


@contextmanager
def _pinned() -> Iterator[None]:
    """Pin what a writer takes from the system: the time of a commit, and the nonce of its epoch."""
    nonce = mock.patch("secrets.token_hex", lambda nbytes=32: (NONCE * nbytes)[: 2 * nbytes])
    with mock.patch("time.time", return_value=NOW), nonce:
        yield


def _make_run(folder: Path) -> None:
    """Write version 0 and its anchor, 1 (compact), 2 (fast, two ranks), 3 (saved only), 4 and its anchor; serve 2."""
    run, views = content.run(), content.run_views()
    bucket = SignedBucket(LocalBucket(folder, create=True), KEY)
    writer = ChainWriter.create(bucket, run)
    _commit_anchor(writer, run, max_shard_bytes=1 << 30)
    _commit(writer, 1, compact=True, info=VersionInfo(step=10, name="Größe 1/4"))
    _commit(writer, 2, ranks=2)
    _commit(writer, 3, info=VersionInfo(serve=False, expires=NOW + 3600))
    _commit(writer, 4, compact=True, info=VersionInfo(step=40, name="last"))
    _commit_anchor(writer, run, max_shard_bytes=10_000)
    writer.serve(2)
    with TemporaryDirectory() as cache:
        for _ in Compactor(bucket, ChainReader(bucket, cache), base=views[0]).run():
            pass


def _commit(
    writer: ChainWriter,
    version: int,
    *,
    compact: bool = False,
    ranks: int = 1,
    info: VersionInfo | None = None,
) -> Manifest:
    before, after = content.run_views()[version - 1 : version + 1]
    patch = content.run_patches()[version - 1]
    position = Position(version, digest_view(TABLE, after).hex)
    encoding = Encoding.COMPACT if compact else Encoding.FAST
    old = ViewBits(TABLE, before) if compact else None
    files = [
        write_delta(
            TABLE, share, Transition(content.RUN_ID, writer.position, position), rank=rank, encoding=encoding, old=old
        )
        for rank, share in enumerate(content.split(patch) if ranks == 2 else [patch])
    ]
    return writer.commit_delta(
        files,
        digest=position.digest,
        changed=changed(patch),
        encoding=encoding,
        info=info or VersionInfo(),
    )


def _commit_anchor(writer: ChainWriter, run: Run, max_shard_bytes: int) -> None:
    """Commit an anchor of the writer's position."""
    view = content.run_views()[writer.position.version]
    with TemporaryDirectory() as name:
        write_anchor(Path(name), run.table, view, max_shard_bytes=max_shard_bytes)
        Path(name, "config.json").write_text(CONFIG)
        writer.commit_anchor(Path(name), at=writer.position)


def _make_adapter_run(folder: Path) -> None:
    """Version 0 as an anchor, and a delta."""
    run, view, patch = content.adapter_run(), content.view_of(LORA), content.adapter_patch()
    writer = ChainWriter.create(LocalBucket(folder, create=True), run)
    with TemporaryDirectory() as name:
        write_adapter(Path(name), run, view)
        writer.commit_anchor(Path(name), at=run.origin)
    position = Position(1, digest_view(LORA, content.advanced(LORA, view, patch)).hex)
    file = write_delta(LORA, patch, Transition(run.run_id, run.origin, position))
    writer.commit_delta([file], digest=position.digest, changed=changed(patch))
