"""The storage half of a local Hub: the content-addressed protocol that hf_xet speaks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import accumulate

from .access import Access
from .server import HttpError, Reply, Request, Route
from .store import Store
from .xet import Chunk, Segment, parse_shard, parse_xorb

_BYTES = "application/octet-stream"
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


@dataclass(frozen=True)
class Term:
    """Chunks `start..end` of a xorb that a reader unpacks to `size` bytes."""

    xorb: str
    size: int
    start: int
    end: int


class CasApi:
    """Routes for chunks, xorbs, shards and reconstructions."""

    def __init__(self, store: Store, access: Access, url: str) -> None:
        self._store, self._access, self._url = store, access, url

    def routes(self) -> list[Route]:
        return [
            Route("GET", "/v1/chunks/{scope}/{hash}", self.find_chunk),
            Route("POST", "/v1/xorbs/{scope}/{hash}", self.put_xorb),
            Route("POST", "/v1/shards", self.put_shard),
            Route("GET", "/v2/reconstructions/{hash}", self.reconstruction),
            Route("GET", "/xorbs/{hash}", self.get_xorb),
            Route("POST", "/v1/telemetry", self.telemetry),
        ]

    def find_chunk(self, request: Request, scope: str, chunk: str) -> Reply:
        """Deduplication across uploads: which xorb holds this chunk?"""
        self._access.require_xet(request, "read")
        shard = self._store.shard_with(chunk)
        if shard is None:
            raise HttpError(404, "unknown chunk")
        return Reply(shard, type=_BYTES)

    def put_xorb(self, request: Request, scope: str, xorb: str) -> Reply:
        self._access.require_xet(request, "write")
        chunks = parse_xorb(request.body)
        return Reply({"was_inserted": self._store.save_xorb(xorb, chunks, request.body)})

    def put_shard(self, request: Request) -> Reply:
        self._access.require_xet(request, "write")
        self._store.save_shard(parse_shard(request.body))
        return Reply({"result": 1})

    def reconstruction(self, request: Request, content: str) -> Reply:
        """Reconstruction of a file or a byte range: chunks in order, and URLs of the xorbs that hold them."""
        offset, terms = self._terms(request, content)
        fetch = {
            xorb: [{"url": self._xorb_url(xorb), "ranges": [{"chunks": chunks, "bytes": bytes_}]}]
            for xorb, chunks, bytes_ in self._ranges(terms)
        }
        steps = [
            {"hash": term.xorb, "unpacked_length": term.size, "range": {"start": term.start, "end": term.end}}
            for term in terms
        ]
        return Reply({"offset_into_first_range": offset, "terms": steps, "xorbs": fetch})

    def get_xorb(self, request: Request, xorb: str) -> Reply:
        """Bytes of a xorb. On the real service this is a signed URL of a CDN, hence no token here."""
        size = self._store.xorb_bytes(xorb)
        if size is None:
            raise HttpError(404, "unknown xorb")
        start, end = _byte_range(request, size)
        headers = {"Content-Range": f"bytes {start}-{end - 1}/{size}"}
        return Reply(self._store.read_xorb(xorb, start, end), status=206, headers=headers, type=_BYTES)

    def telemetry(self, request: Request) -> Reply:
        return Reply({})

    def _terms(self, request: Request, content: str) -> tuple[int, list[Term]]:
        """The terms to unpack for the requested bytes of a file, and the bytes of the first chunk to skip."""
        self._access.require_xet(request, "read")
        segments = self._store.segments(content)
        if segments is None:
            raise HttpError(404, "unknown file")
        start, end = _byte_range(request, sum(segment.size for segment in segments))
        terms: list[Term] = []
        offset = at = 0
        for segment in segments:
            low, at = at, at + segment.size
            if at <= start or low >= end:
                continue
            term, skipped = self._trimmed(segment, max(start - low, 0), min(end, at) - low)
            if not terms:
                offset = max(start - low, 0) - skipped
            terms.append(term)
        return offset, terms

    def _trimmed(self, segment: Segment, start: int, end: int) -> tuple[Term, int]:
        """The chunks that hold bytes `start..end` of a segment, and the bytes of the chunks before them."""
        chunks = self._chunks(segment.xorb)[segment.start : segment.end]
        edges = list(accumulate((chunk.size for chunk in chunks), initial=0))
        first = max(n for n in range(len(chunks)) if edges[n] <= start)
        last = min(n for n in range(1, len(edges)) if edges[n] >= end)
        size = edges[last] - edges[first]
        return Term(segment.xorb, size, segment.start + first, segment.start + last), edges[first]

    def _ranges(self, terms: list[Term]) -> list[tuple[str, dict[str, int], dict[str, int]]]:
        """Per xorb one range that covers all its terms: (xorb, chunks with exclusive end, bytes with inclusive end)."""
        spans: dict[str, tuple[int, int]] = {}
        for term in terms:
            start, end = spans.get(term.xorb, (term.start, term.end))
            spans[term.xorb] = (min(start, term.start), max(end, term.end))
        ranges = []
        for xorb, (start, end) in spans.items():
            chunks = self._chunks(xorb)
            first = chunks[start - 1].end if start else 0
            ranges.append((xorb, {"start": start, "end": end}, {"start": first, "end": chunks[end - 1].end - 1}))
        return ranges

    def _chunks(self, xorb: str) -> list[Chunk]:
        chunks = self._store.chunks(xorb)
        if chunks is None:
            raise HttpError(500, f"xorb {xorb} is gone")
        return chunks

    def _xorb_url(self, xorb: str) -> str:
        return f"{self._url}/xorbs/{xorb}"


def _byte_range(request: Request, size: int) -> tuple[int, int]:
    """Requested bytes as (start, exclusive end); all of them without a Range header. HttpError 416 past the end."""
    match = _RANGE.fullmatch(request.headers.get("Range") or "bytes=0-")
    if match is None:
        raise HttpError(416, "malformed range")
    start = int(match[1])
    end = min(size, int(match[2]) + 1) if match[2] else size
    if start >= end:
        raise HttpError(416, "range past the end", **{"Content-Range": f"bytes */{size}"})
    return start, end
