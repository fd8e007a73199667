"""Translates errors of huggingface_hub and hf_xet into those of `hubsync.errors`.

There are four families:

* `HfHubHTTPError`, with a response;
* errors of the HTTP library beneath (httpx or httpx2, depending on the version of huggingface_hub);
* builtin ConnectionError from hf_xet's uploads and tokens, with the HTTP status only in its text;
* RuntimeError from hf_xet's downloads, likewise.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    BucketBatchError,
    BucketNotFoundError,
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
)

from hubsync.errors import BucketDenied, BucketError, BucketMissing, BucketUnavailable, ObjectCorrupt, ObjectMissing

from .address import HubAddress

# The base of HfHubHTTPError is the base error of its HTTP library. ValueError: the answer does not come from a Hub, but
# for example from a proxy. KeyboardInterrupt and hubsync's own errors pass.
_HTTP_LIBRARY: type[Exception] = HfHubHTTPError.__bases__[0]
_FOREIGN = (_HTTP_LIBRARY, EntryNotFoundError, OSError, RuntimeError, ValueError)

_STATUS_IN_TEXT = re.compile(r"\((\d{3}) [A-Z]")
_LISTED = 10  # paths in a message


@contextmanager
def translated(action: str, address: HubAddress) -> Iterator[None]:
    """Raise every foreign error inside as a BucketError with a remedy."""
    try:
        yield
    except _FOREIGN as error:
        raise translate(error, action, address) from error


def translate(error: Exception, action: str, address: HubAddress) -> BucketError:
    """The BucketError for a foreign `error` that was raised while trying to `action`."""
    failed = f"cannot {action} in bucket {address.bucket}"
    if isinstance(error, BucketBatchError):
        return BucketError(f"{failed}: the Hub refused {_paths(error.failures)}. The other objects were written")
    if isinstance(error, EntryNotFoundError):
        return ObjectMissing(f"{failed}: {_first_line(error)}")
    if isinstance(error, (BucketNotFoundError, RepositoryNotFoundError)):
        return _missing(failed, address)
    if isinstance(error, HfHubHTTPError):
        return _by_status(error.response.status_code, error, failed, address)
    if match := _STATUS_IN_TEXT.search(str(error)):
        return _by_status(int(match[1]), error, failed, address)
    if isinstance(error, RuntimeError):
        return _by_text(error, failed)
    network = isinstance(error, (ConnectionError, TimeoutError))
    if not network and isinstance(error, (OSError, ValueError)):
        return BucketError(f"{failed}: {_first_line(error)}")  # a local file, or not a Hub's answer
    return BucketUnavailable(f"{failed}: no connection to {_hub(error)} ({_first_line(error)}). Try again later")


def _hub(error: Exception) -> str:
    """The Hub's URL if the HTTP library knows it: HF_ENDPOINT may name a Hub that is down."""
    try:
        url = error.request.url  # type: ignore[attr-defined]
    except (AttributeError, RuntimeError):
        return "the Hub"
    return f"the Hub at {url.scheme}://{url.netloc.decode()}"


def _by_status(status: int, error: Exception, failed: str, address: HubAddress) -> BucketError:
    namespace = address.bucket.partition("/")[0]
    if status == 401:
        return BucketDenied(
            f"{failed}: the Hub rejected the token, or none is set. Run `hf auth login`, or set HF_TOKEN"
        )
    if status == 403:
        return BucketDenied(
            f"{failed}: the token has no permission. Set one with write access to {namespace} "
            "(https://huggingface.co/settings/tokens) with `hf auth login` or HF_TOKEN"
        )
    if status in (408, 429) or status >= 500:
        return BucketUnavailable(f"{failed}: {_first_line(error)}. Several tries failed; try again later")
    if status != 404:
        return BucketError(f"{failed}: {_first_line(error)}")
    if isinstance(error, HfHubHTTPError) or "/api/buckets/" in str(error):
        return _missing(failed, address)
    return ObjectMissing(f"{failed}: the Hub lists the object but has lost the content ({_first_line(error)})")


def _by_text(error: RuntimeError, failed: str) -> BucketError:
    text = str(error)
    if "Format error" in text or "Decompression" in text:
        return ObjectCorrupt(f"{failed}: the Hub sent damaged bytes ({_first_line(error)})")
    if "(os error " in text and "rror sending request" not in text:
        return BucketError(f"{failed}: this machine cannot store the download ({_first_line(error)})")
    return BucketUnavailable(f"{failed}: {_first_line(error)}. Try again later")


def _missing(failed: str, address: HubAddress) -> BucketMissing:
    return BucketMissing(
        f"{failed}: the bucket does not exist, or the token cannot see it. Check the address. Run `hf auth login` if "
        f"it is private, or create it with `hf buckets create {address.bucket} --private`"
    )


def _paths(failures: list[dict[str, str]]) -> str:
    listed = ", ".join(f"{failure.get('path')} ({failure.get('error')})" for failure in failures[:_LISTED])
    return listed + (f" and {len(failures) - _LISTED} more" if len(failures) > _LISTED else "")


def _first_line(error: Exception) -> str:
    """The first line with text: messages of huggingface_hub begin with blank lines and end with links."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)
