"""Access control: Hugging Face tokens for the Hub, short-lived xet tokens for the storage."""

from __future__ import annotations

import hashlib
import hmac
import time
from dataclasses import dataclass

from .server import HttpError, Request

XET_TOKEN_SECONDS = 3600


@dataclass(frozen=True)
class Access:
    """Token checks of one local Hub.

    Attributes:
        secret: key that xet tokens are signed with, so that they survive a restart.
        tokens: accepted Hugging Face tokens; None accepts everybody, with or without a token.
        read_only: accepted tokens that may not write.
    """

    secret: bytes
    tokens: frozenset[str] | None
    read_only: frozenset[str]

    def require_hub(self, request: Request, *, write: bool = False) -> None:
        """HttpError 401 or 403 with the Hub's texts."""
        token = request.bearer
        if token in self.read_only:
            if write:
                raise HttpError(403, "Forbidden: you must use a write token")
            return
        if self.tokens is None or token in self.tokens:
            return
        if token is not None:
            raise HttpError(401, "Invalid credentials in Authorization header")
        if write:
            raise HttpError(401, "Invalid username or password.")

    def is_anonymous(self, request: Request) -> bool:
        """Whether this request may only see public buckets."""
        return self.tokens is not None and request.bearer is None

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
