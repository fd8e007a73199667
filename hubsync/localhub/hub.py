"""The bucket half of a local Hub: buckets, names of files, batches. Answers what huggingface_hub reads.

Page size, error texts and the answer to deleting a missing path are a model of the real service, not a copy.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, urlencode

from .access import USER, Access
from .events import Events
from .lag import Lag
from .server import HttpError, Reply, Request, Route
from .store import BucketRow, FileRow, ModelFile, Store, timestamp

_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_HASH = re.compile(r"[0-9a-f]{64}")
_MAX_PATHS = 1000
_MAX_OPERATIONS = 1000
_MAX_PAGE = 10_000


@dataclass
class Refusal:
    """The next `times` batch operations on paths that match are not done; `silently` reports them as done."""

    match: re.Pattern[str]
    silently: bool
    times: int


class BucketApi:
    """Routes below `/api/buckets` and `/buckets`."""

    def __init__(self, store: Store, access: Access, url: str, page: int) -> None:
        self._store, self._access, self._url, self._page = store, access, url, page
        self.refusals: list[Refusal] = []
        self.lag = Lag()
        self.events = Events()

    def routes(self) -> list[Route]:
        bucket = "/api/buckets/{namespace}/{name}"
        return [
            Route("GET", "/api/whoami-v2", self.whoami),
            Route("GET", "/api/buckets/{namespace}", self.list_buckets),
            Route("POST", bucket, self.create),
            Route("GET", bucket, self.info),
            Route("DELETE", bucket, self.delete),
            Route("GET", bucket + "/tree", self.tree),
            Route("GET", bucket + "/tree/{path}", self.tree),
            Route("POST", bucket + "/paths-info", self.paths_info),
            Route("POST", bucket + "/batch", self.batch),
            Route("GET", bucket + "/events", self.follow),
            Route("GET", bucket + "/xet-read-token", self.read_token),
            Route("GET", bucket + "/xet-write-token", self.write_token),
            Route("POST", "/api/models/{namespace}/{name}/paths-info/{revision}", self.model_paths_info),
            Route("HEAD", "/buckets/{namespace}/{name}/resolve/{path}", self.resolve),
        ]

    # --- buckets ------------------------------------------------------------------------------------

    def whoami(self, request: Request) -> Reply:
        user = self._access.user(request)
        if user is None:
            raise HttpError(401, "Invalid username or password.")
        return Reply({"type": "user", "name": user, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def list_buckets(self, request: Request, namespace: str) -> Reply:
        owner, wanted = self._access.owns(request, namespace), request.query.get("search", "")
        rows = self._store.buckets(namespace)
        return Reply([_info(row) for row in rows if wanted in row.id and (owner or not row.private)])

    def create(self, request: Request, namespace: str, name: str) -> Reply:
        user = self._access.user(request)
        namespace = user if namespace == USER and user is not None else namespace
        doc, bucket = request.json(), _bucket_id(namespace, name)
        self._access.require_writer(request, namespace)
        private = doc.get("visibility") == "private" or doc.get("private") is True
        url = f"{self._url}/buckets/{bucket}"
        if not self._store.create_bucket(bucket, private):
            # With exist_ok the client takes the url from the body of this error.
            raise HttpError(409, "You already created this bucket", body={"error": "exists", "url": url})
        return Reply({"url": url, "name": bucket})

    def info(self, request: Request, namespace: str, name: str) -> Reply:
        return Reply(_info(self._bucket(request, namespace, name)))

    def delete(self, request: Request, namespace: str, name: str) -> Reply:
        self._store.delete_bucket(self._bucket(request, namespace, name, write=True).id)
        return Reply(status=204)

    # --- files --------------------------------------------------------------------------------------

    def tree(self, request: Request, namespace: str, name: str, prefix: str = "") -> Reply:
        """One page. `prefix` matches letters, not directories. Folders fold at the first slash after it."""
        bucket = self._bucket(request, namespace, name)
        recursive = request.query.get("recursive", "true").lower() == "true"
        page = _page_size(request, self._page)
        after = request.query.get("cursor", "")
        entries: list[dict[str, Any]] = []
        for row in self.lag.listed(bucket.id, prefix, after, self._store.files(bucket.id, prefix, after)):
            folder = None if recursive else _folder(row.path, prefix)
            if folder is not None and (after.startswith(folder + "/") or (entries and entries[-1]["path"] == folder)):
                after = row.path
                continue
            if len(entries) == page:
                query = urlencode({**request.query, "cursor": after})
                return Reply(entries, headers={"Link": f'<{self._url}{request.path}?{query}>; rel="next"'})
            entries.append(_entry(row) if folder is None else _folder_entry(folder, row))
            after = row.path
        return Reply(entries)

    def paths_info(self, request: Request, namespace: str, name: str) -> Reply:
        bucket = self._bucket(request, namespace, name)
        paths = request.json().get("paths")
        if not isinstance(paths, list) or len(paths) > _MAX_PATHS or not all(isinstance(p, str) for p in paths):
            raise HttpError(400, f"paths must be a list of at most {_MAX_PATHS} strings")
        rows = (self._visible(bucket.id, path) for path in paths)
        return Reply([_entry(row) for row in rows if row is not None])

    def model_paths_info(self, request: Request, namespace: str, name: str, revision: str) -> Reply:
        """Files of a model repository, all of which are large files in Xet storage, the same at every revision."""
        self._access.user(request)
        files = self._store.model(f"{namespace}/{name}")
        if not files:
            raise HttpError(404, "Repository not found", "RepoNotFound")
        paths = parse_qs(request.body.decode()).get("paths", [])
        return Reply([_model_entry(files[path]) for path in paths if path in files])

    def batch(self, request: Request, namespace: str, name: str) -> Reply:
        """Run operations one by one, each independently. Failures are listed. Not a transaction."""
        bucket = self._bucket(request, namespace, name, write=True)
        if "ndjson" not in (request.headers.get("Content-Type") or ""):
            raise HttpError(400, "expected application/x-ndjson")
        operations = [_operation(line) for line in request.body.splitlines() if line.strip()]
        if len(operations) > _MAX_OPERATIONS:
            raise HttpError(400, f"a batch has at most {_MAX_OPERATIONS} operations")
        failed, changes = [], []
        with self._store.transaction():
            for operation in operations:
                path = operation["path"]
                before = self._store.file(bucket.id, path)
                if error := self._apply(bucket.id, operation):
                    failed.append({"path": path, "error": error})
                else:
                    after = self._store.file(bucket.id, path)
                    self.lag.wrote(bucket.id, path, before, after)
                    changes.append(_change(path, before, after))
            time_ = self._store.touch(bucket.id)
        self.events.publish(bucket.id, time_, changes)
        done = {"success": not failed, "processed": len(operations), "succeeded": len(operations) - len(failed)}
        return Reply({**done, "failed": failed}, status=422 if failed and len(failed) == len(operations) else 200)

    def follow(self, request: Request, namespace: str, name: str) -> Reply:
        """The event stream. Events come at once, also of names that readers see late."""
        bucket = self._bucket(request, namespace, name)
        return Reply(self.events.stream(bucket.id, request.query), type="text/event-stream")

    def resolve(self, request: Request, namespace: str, name: str, path: str) -> Reply:
        """Headers only: the content itself is read from the storage half."""
        bucket = self._bucket(request, namespace, name)
        row = self._visible(bucket.id, path)
        if row is None:
            raise HttpError(404, "Entry not found", "EntryNotFound")
        token = f"{self._url}/api/buckets/{bucket.id}/xet-read-token"
        headers = {
            "X-Xet-Hash": row.hash,
            "X-Xet-Refresh-Route": token,
            "X-Linked-Size": str(row.size),
            "Content-Length": str(row.size),
            "ETag": f'"{row.hash}"',
            "Link": f'<{token}>; rel="xet-auth"',
        }
        return Reply(headers=headers, type=row.type or "application/octet-stream")

    # --- tokens -------------------------------------------------------------------------------------

    def read_token(self, request: Request, namespace: str, name: str) -> Reply:
        self._bucket(request, namespace, name)
        return self._xet_token("read")

    def write_token(self, request: Request, namespace: str, name: str) -> Reply:
        self._bucket(request, namespace, name, write=True)
        return self._xet_token("write")

    def _xet_token(self, scope: str) -> Reply:
        token, expires = self._access.xet_token(scope)
        headers = {
            "X-Xet-Cas-Url": self._url,
            "X-Xet-Access-Token": token,
            "X-Xet-Token-Expiration": str(expires),
        }
        return Reply({"accessToken": token, "exp": expires, "casUrl": self._url}, headers=headers)

    # --- inside -------------------------------------------------------------------------------------

    def _bucket(self, request: Request, namespace: str, name: str, *, write: bool = False) -> BucketRow:
        owner = self._access.owns(request, namespace)
        row = self._store.bucket(_bucket_id(namespace, name))
        if row is None or (row.private and not owner):
            raise self._access.hidden(request)
        if write:
            self._access.require_writer(request, namespace)
        return row

    def _visible(self, bucket: str, path: str) -> FileRow | None:
        return self.lag.seen(bucket, path, self._store.file(bucket, path))

    def _apply(self, bucket: str, operation: dict[str, Any]) -> str | None:
        """Do one operation; the reason if it cannot be done."""
        kind, path = operation["type"], operation["path"]
        if not _is_path(path):
            return "Invalid path"
        if refusal := next((r for r in self.refusals if r.times > 0 and r.match.search(path)), None):
            refusal.times -= 1
            return None if refusal.silently else "injected"
        if kind == "deleteFile":
            return None if self._store.delete_file(bucket, path) else "File not found"
        content = operation.get("xetHash")
        if not isinstance(content, str) or not _HASH.fullmatch(content):
            return "Invalid xetHash"
        if kind == "copyFile" and not self._source_holds(operation, content):
            return f"Source has no file with hash {content}"
        mtime, type_ = operation.get("mtime"), operation.get("contentType")
        mtime = mtime if type(mtime) is int else int(time.time() * 1000)
        if not self._store.write_file(bucket, path, content, mtime, type_ if isinstance(type_, str) else None):
            return f"Xet file {content} not found"
        return None

    def _source_holds(self, operation: dict[str, Any], content: str) -> bool:
        source = str(operation.get("sourceRepoId"))
        if operation.get("sourceRepoType") == "model":
            return any(file.hash == content for file in self._store.model(source).values())
        return self._store.holds(source, content)


def _operation(line: bytes) -> dict[str, Any]:
    try:
        operation = json.loads(line)
    except ValueError:
        operation = None
    known = isinstance(operation, dict) and operation.get("type") in ("addFile", "copyFile", "deleteFile")
    if not known or not isinstance(operation.get("path"), str):
        raise HttpError(400, "each line must be an operation with a type and a path")
    return operation


def _bucket_id(namespace: str, name: str) -> str:
    if not _PART.fullmatch(namespace) or not _PART.fullmatch(name):
        raise HttpError(400, "malformed bucket id")
    return f"{namespace}/{name}"


def _page_size(request: Request, page: int) -> int:
    """Entries of one page: `limit` of the request, or the default."""
    limit = request.query.get("limit", "")
    return min(max(1, int(limit)), _MAX_PAGE) if limit.isdecimal() else page


def _is_path(path: str) -> bool:
    segments = path.split("/")
    return len(path) <= 1024 and path.isprintable() and not any(part in ("", ".", "..") for part in segments)


def _folder(path: str, prefix: str) -> str | None:
    """The folder that a non-recursive listing shows instead of `path`; None if it shows the file itself."""
    slash = path.find("/", len(prefix) + path.startswith("/", len(prefix)))
    return path[:slash] if slash >= 0 else None


def _folder_entry(folder: str, row: FileRow) -> dict[str, Any]:
    return {"type": "directory", "path": folder, "uploadedAt": row.uploaded}


def _entry(row: FileRow) -> dict[str, Any]:
    return {
        "type": "file",
        "path": row.path,
        "size": row.size,
        "xetHash": row.hash,
        "mtime": timestamp(row.mtime),
        "uploadedAt": row.uploaded,
    }


def _change(path: str, before: FileRow | None, after: FileRow | None) -> dict[str, Any]:
    """What the event stream says of a name that was written or deleted."""
    if after is None:
        return {"path": path, "op": "delete"}
    return {**_entry(after), "op": "add" if before is None else "update"}


def _model_entry(file: ModelFile) -> dict[str, Any]:
    lfs = {"oid": file.sha256, "size": file.size, "pointerSize": 135}
    return {"type": "file", "path": file.path, "size": file.size, "oid": "0" * 40, "lfs": lfs, "xetHash": file.hash}


def _info(row: BucketRow) -> dict[str, Any]:
    return {
        "id": row.id,
        "private": row.private,
        "createdAt": row.created,
        "updatedAt": row.updated,
        "size": row.size,
        "totalFiles": row.files,
    }
