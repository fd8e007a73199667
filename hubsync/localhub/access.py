"""Access control: Hugging Face tokens for the Hub, short-lived xet tokens for the storage."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Mapping
from dataclasses import dataclass

from .server import HttpError, Request

XET_TOKEN_SECONDS = 3600


USER = "me"  # owner of tokens without another, and the client's name for the namespace of the current user


@dataclass(frozen=True)
class Access:
    """Token checks of one local Hub. Answers as the real one does: 401 without a token, 404 for what one may not see.

    Attributes:
        secret: key that xet tokens are signed with, so that they survive a restart.
        tokens: accepted Hugging Face tokens and the user each belongs to; None accepts everybody everywhere.
        read_only: those that may not write.
    """

    secret: bytes
    tokens: Mapping[str, str] | None
    read_only: frozenset[str]

    def user(self, request: Request) -> str | None:
        """The user that a request comes from; None without a token. HttpError 401 for an unknown token."""
        token = request.bearer
        if self.tokens is None:
            return USER
        if token is None:
            return None
        if token not in self.tokens:
            raise HttpError(401, "Invalid credentials in Authorization header")
        return self.tokens[token]

    def owns(self, request: Request, namespace: str) -> bool:
        """Whether a namespace is that of the user. HttpError 401 for an unknown token."""
        return self.user(request) == namespace or self.tokens is None

    def require_writer(self, request: Request, namespace: str) -> None:
        """HttpError 401 or 403 unless the request may write to a namespace."""
        if self.user(request) is None:
            raise HttpError(401, "Invalid username or password.")
        if request.bearer in self.read_only:
            raise HttpError(403, "Forbidden: you must use a write token")
        if not self.owns(request, namespace):
            raise HttpError(403, f"You don't have the rights to write under the namespace {namespace!r}")

    def hidden(self, request: Request) -> HttpError:
        """The answer for a bucket that does not exist, or that the request may not see."""
        if self.user(request) is None:
            return HttpError(401, "Invalid username or password.")
        return HttpError(404, "Repository not found", "RepoNotFound")

    def xet_token(self, scope: str) -> tuple[str, int]:
        """A token for "read" or "write", and the second since 1970 at which it expires."""
        expires = int(time.time()) + XET_TOKEN_SECONDS
        return f"xet_{scope}_{expires}_{self._signature(scope, expires)}", expires

    def require_xet(self, request: Request, scope: str) -> None:
        """HttpError 401 or 403; a write token may also read."""
        kind, _, rest = (request.bearer or "").partition("_")
        granted, expires, signature = ([*rest.split("_"), "", "", ""])[:3]
        if kind != "xet" or not expires.isdecimal() or int(expires) < time.time():
            raise HttpError(401, "missing or expired xet token")
        if not hmac.compare_digest(signature, self._signature(granted, int(expires))):
            raise HttpError(401, "forged xet token")
        if scope == "write" and granted != "write":
            raise HttpError(403, "this xet token may only read")

    def _signature(self, scope: str, expires: int) -> str:
        return hmac.new(self.secret, f"{scope}.{expires}".encode(), hashlib.sha256).hexdigest()[:32]
