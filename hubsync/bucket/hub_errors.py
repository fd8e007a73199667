"""Translates failures of the Hub into the errors of `hubsync.errors`.

There are three families:

* answers with a status that reports an error;
* errors of the HTTP library beneath huggingface_hub (httpx or httpx2, depending on its version);
* ConnectionError and RuntimeError from hf_xet's transfers, with the HTTP status only in their text.

No text contains a token, or the password of a URL.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from hubsync.errors import BucketDenied, BucketError, BucketMissing, BucketUnavailable, ObjectCorrupt, ObjectMissing

from .redaction import redacted

# The base of HfHubHTTPError is the base error of its HTTP library. ValueError: the answer is not what the library
# expects. KeyboardInterrupt and hubsync's own errors pass.
_HTTP_LIBRARY: type[Exception] = HfHubHTTPError.__bases__[0]
FOREIGN = (_HTTP_LIBRARY, OSError, RuntimeError, ValueError)

_USELESS_AGAIN = frozenset({"UnsupportedProtocol", "LocalProtocolError", "TooManyRedirects"})
_STATUS_IN_TEXT = re.compile(r"\((\d{3}) [A-Z]")
_LOOPBACK = re.compile(r"localhost|127\.[\d.]+|::1")
_LISTED = 10  # paths in a message


@dataclass(frozen=True)
class HubPlace:
    """A bucket on a Hub, for messages."""

    bucket: str
    endpoint: str

    @property
    def hub(self) -> str:
        """The Hub's URL without user and password: HF_ENDPOINT may name a Hub that is down."""
        return redacted(self.endpoint)

    @property
    def proxy(self) -> str:
        """How to avoid a proxy that requests pass through; "" if there is none."""
        url = urlsplit(self.endpoint)
        host = url.hostname or ""
        proxies = getproxies()
        proxy = proxies.get(url.scheme) or proxies.get("all")
        if not proxy or proxy_bypass(host):
            return ""
        through = f". The proxy settings of the environment apply: requests go through {redacted(proxy)}"
        if _LOOPBACK.fullmatch(host):
            return f"{through}, which cannot reach this machine's {host}. Set NO_PROXY=localhost,127.0.0.1,::1"
        return f"{through}. If it must not be used for this Hub, add {host} to NO_PROXY"

    def failed(self, action: str) -> str:
        return f"cannot {action} in bucket {self.bucket}"

    def not_a_hub(self, action: str) -> BucketError:
        """The error for an answer that no Hub gives."""
        return BucketError(
            f"{self.failed(action)}: {self.hub} does not answer as a Hub does. Check HF_ENDPOINT{self.proxy}"
        )


def by_connection(error: Exception, action: str, place: HubPlace) -> BucketError:
    """The BucketError for a request that was not answered: BucketUnavailable if asking again may help."""
    said = first_line(error)
    if isinstance(error, OfflineModeIsEnabled):
        return BucketError(f"{place.failed(action)}: huggingface_hub's offline mode is on. Unset HF_HUB_OFFLINE")
    passing = isinstance(error, (ConnectionError, TimeoutError, _HTTP_LIBRARY))
    if not passing or type(error).__name__ in _USELESS_AGAIN:
        return BucketError(f"{place.failed(action)}: {said}. Check HF_ENDPOINT ({place.hub}){place.proxy}")
    if "Timeout" in type(error).__name__:
        said = "it accepted the request and says nothing" if "Read" in type(error).__name__ else f"timeout: {said}"
    return BucketUnavailable(
        f"{place.failed(action)}: no connection to the Hub at {place.hub} ({said}). Try again later{place.proxy}"
    )


def by_status(
    status: int, headers: Mapping[str, str], body: Any, action: str, place: HubPlace, *, wait: float = 0.0
) -> BucketError:
    """The BucketError for an answer with this status. `wait`: seconds until the Hub allows the next request."""
    said = headers.get("X-Error-Message") or (body.get("error") if isinstance(body, dict) else None) or ""
    said = redacted(f"{status} {first_line(said)}".strip())
    foreign = place.proxy if body is None else ""  # a page of something between here and the Hub
    if status == 404:
        return _missing(place.failed(action), place, foreign)
    return _of_status(status, said, place.failed(action), place, foreign, wait)


def by_transfer(error: Exception, action: str, place: HubPlace) -> BucketError:
    """The BucketError for an error of hf_xet, or of a local file that it reads or writes."""
    failed, said = place.failed(action), first_line(error)
    if match := _STATUS_IN_TEXT.search(str(error)):
        status = int(match[1])
        if status != 404:
            return _of_status(status, said, failed, place, "", 0.0)
        if "/api/buckets/" in str(error):
            return _missing(failed, place, "")
        return ObjectMissing(f"{failed}: the Hub lists the object but has lost the content ({said})")
    if isinstance(error, RuntimeError):
        return _by_text(str(error), said, failed, place)
    if isinstance(error, (ConnectionError, TimeoutError)):
        return BucketUnavailable(f"{failed}: no connection to the Hub ({said}). Try again later{place.proxy}")
    return BucketError(f"{failed}: {said}")  # a local file


def refused(failures: Sequence[Mapping[str, str]], action: str, place: HubPlace) -> BucketError:
    """The error for a batch of which some operations were not done."""
    listed = ", ".join(f"{failure.get('path')} ({failure.get('error')})" for failure in failures[:_LISTED])
    more = f" and {len(failures) - _LISTED} more" if len(failures) > _LISTED else ""
    return Refused(f"{place.failed(action)}: the Hub refused {redacted(listed)}{more}. The other objects were written")


class Refused(BucketError):
    """The Hub did not do some operations of a batch."""


def first_line(said: object) -> str:
    """The first line with text, without secrets. The name of the class for an error without a text."""
    lines = (line.strip() for line in str(said).splitlines())
    return redacted(next((line for line in lines if line), type(said).__name__ if isinstance(said, Exception) else ""))


def _of_status(status: int, said: str, failed: str, place: HubPlace, foreign: str, wait: float) -> BucketError:
    if status == 401:
        return BucketDenied(
            f"{failed}: the Hub rejected the token, or none is set (without one it also says so of a bucket that does "
            f"not exist). Run `hf auth login`, or set HF_TOKEN{foreign}"
        )
    if status == 403:
        return BucketDenied(
            f"{failed}: the token has no permission. Set one with write access to {place.bucket.partition('/')[0]} "
            f"(https://huggingface.co/settings/tokens) with `hf auth login` or HF_TOKEN{foreign}"
        )
    if status == 429 and wait:
        return BucketUnavailable(
            f"{failed}: the Hub limits requests ({said}) and allows the next one in {wait:.0f} s. Try again later, and "
            "publish or poll less often"
        )
    if status in (408, 429) or status >= 500:
        return BucketUnavailable(f"{failed}: {said}. Several tries failed; try again later{place.proxy}")
    return BucketError(f"{failed}: {said}{foreign}")


def _by_text(text: str, said: str, failed: str, place: HubPlace) -> BucketError:
    if "Format error" in text or "Decompression" in text:
        return ObjectCorrupt(f"{failed}: the Hub sent damaged bytes ({said})")
    if "(os error " in text and "rror sending request" not in text:
        return BucketError(f"{failed}: this machine cannot store the download ({said})")
    return BucketUnavailable(f"{failed}: {said}. Try again later{place.proxy}")


def _missing(failed: str, place: HubPlace, foreign: str) -> BucketMissing:
    return BucketMissing(
        f"{failed}: the bucket does not exist, or the token cannot see it. Check the address. Run `hf auth login` if "
        f"it is private, or create it with `hf buckets create {place.bucket} --private`{foreign}"
    )
