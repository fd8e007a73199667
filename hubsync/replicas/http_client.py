"""Settings of HTTP clients to inference servers: credentials, proxies, certificates, connection reuse and logging."""

from __future__ import annotations

import base64
import functools
import ipaddress
import logging
import os
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies

import httpx

from hubsync.errors import ConfigError
from hubsync.retry import Deadline

from .server import plain_url

API_KEY_VARIABLE = "VLLM_API_KEY"

_LOOPBACK = ("localhost", "127.0.0.1", "::1")

MAX_ANSWER = 512 << 20  # bytes; the layouts of many workers are long

# vLLM closes connections that were idle for 5 seconds. A request on a kept connection must not cross with that.
LIMITS = httpx.Limits(max_connections=None, keepalive_expiry=2.0)


@dataclass(frozen=True)
class ServerAccess:
    """Where a server is, and how requests to it are authorized. Get one from `access_to`.

    Attributes:
        url: base URL for requests and messages: without user, password and slash at its end.
        headers: the `Authorization` header, if there are credentials.
    """

    url: str
    headers: dict[str, str] = field(repr=False)
    _secrets: tuple[str, ...] = field(repr=False)

    def hide(self, text: str) -> str:
        """The text, of a response, without the credentials: some servers repeat what they were sent."""
        return functools.reduce(lambda shown, secret: shown.replace(secret, "***"), self._secrets, text)


def access_to(url: str, api_key: str | None = None) -> ServerAccess:
    """Access to the server at a URL that `checked_url` accepts.

    Credentials are user and password of the URL, else the API key, else the environment variable `VLLM_API_KEY`.

    Raises:
        ConfigError: the API key has characters that no HTTP header can carry.
    """
    parts = urlsplit(url)
    plain = plain_url(url)
    if parts.username is not None or parts.password is not None:
        user, password = unquote(parts.username or ""), unquote(parts.password or "")
        encoded = base64.b64encode(f"{user}:{password}".encode()).decode()
        secrets = tuple(secret for secret in (encoded, password) if secret)
        return ServerAccess(plain, {"Authorization": f"Basic {encoded}"}, secrets)
    key = (os.environ.get(API_KEY_VARIABLE, "") if api_key is None else api_key).strip()
    if not key:
        return ServerAccess(plain, {}, ())
    if not key.isascii() or not key.isprintable():
        raise ConfigError(
            "the API key has characters other than printable ASCII: copy it again (SyncConfig(api_key=...), "
            f"`hubsync follow --api-key`, or {API_KEY_VARIABLE})"
        )
    return ServerAccess(plain, {"Authorization": f"Bearer {key}"}, (key,))


def new_client(access: ServerAccess) -> httpx.Client:
    """A client for requests to a server. It follows redirects and retries nothing.

    Proxies come from the environment (`HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY`, `NO_PROXY`), except to this machine.
    Certificates come from `REQUESTS_CA_BUNDLE`, `CURL_CA_BUNDLE` or `SSL_CERT_FILE` if set. The log of httpx at level
    INFO leaves these requests out: a status is asked for many times a second.
    """
    _leave_out_of_log(access.url)
    return httpx.Client(
        headers=access.headers,
        limits=LIMITS,
        follow_redirects=True,
        trust_env=trusts_environment(access.url),
        verify=_certificates(access.url),
    )


def whole_answer(client: httpx.Client, verb: str, url: str, timeout: float, **request: Any) -> httpx.Response:
    """The complete answer to a request: its first byte within `timeout` seconds, and all of it in as many more.

    httpx alone would wait for ever for one that trickles. ReadTimeout if it is late, DecodingError if it has more than
    `MAX_ANSWER` bytes.
    """
    with client.stream(verb, url, timeout=timeout, **request) as answer:
        deadline, body = Deadline(timeout), bytearray()
        for piece in answer.iter_bytes():
            body += piece
            if deadline.passed:
                raise httpx.ReadTimeout("the answer is not complete", request=answer.request)
            if len(body) > MAX_ANSWER:
                raise httpx.DecodingError(f"the answer has more than {MAX_ANSWER} bytes", request=answer.request)
    plain = {name: value for name, value in answer.headers.items() if name != "content-encoding"}
    return httpx.Response(
        answer.status_code, headers=plain, content=bytes(body), request=answer.request, history=answer.history
    )


def trusts_environment(url: str) -> bool:
    """Whether a client for `url` may use proxies of the environment: not to this machine, nor to a `NO_PROXY` network.

    httpx reads `NO_PROXY` too, but knows no networks such as `10.0.0.0/8`.
    """
    host = urlsplit(url).hostname or ""
    return host not in _LOOPBACK and not _is_in(host, getproxies().get("no", ""))


def _is_in(host: str, networks: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    for network in networks.replace(" ", "").split(","):
        try:
            if "/" in network and address in ipaddress.ip_network(network, strict=False):
                return True
        except ValueError:  # a host name
            continue
    return False


def _certificates(url: str) -> ssl.SSLContext:
    parts = urlsplit(url)
    is_default = parts.scheme == "http" or parts.hostname in _LOOPBACK
    names = () if is_default else ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR")
    return _context(*(os.environ.get(name, "") for name in names))


@functools.cache  # loading certificates takes 50 ms
def _context(*locations: str) -> ssl.SSLContext:
    """Trusts the certificates in the first location that is given, a file or a directory; by default certifi's."""
    location = next(filter(None, locations), None)
    if location is None:
        return httpx.create_ssl_context(trust_env=False)
    if Path(location).is_dir():
        return ssl.create_default_context(capath=location)
    return ssl.create_default_context(cafile=location)


class _ServerFilter(logging.Filter):
    """Drops what httpx logs of each request at level INFO, for the servers that hubsync drives."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno > logging.INFO or not isinstance(record.args, tuple) or len(record.args) < 2:
            return True
        return not str(record.args[1]).startswith(tuple(self.urls))


_filter = _ServerFilter()


def _leave_out_of_log(url: str) -> None:
    _filter.urls.add(url)
    logging.getLogger("httpx").addFilter(_filter)  # adding it again changes nothing
