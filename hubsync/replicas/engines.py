"""Inference engines: which client class speaks to a server URL, by the URL's scheme.

`http` and `https` are vLLM servers. A package adds an engine with an entry point of the group
`hubsync.inference_engines`: the name is the URL scheme, the object is called as `Client(url, api_key, timeout=seconds)`
and returns an [`InferenceServer`].

    [project.entry-points."hubsync.inference_engines"]
    null = "my_package:NullServer"    # Deployment(["null://localhost"]), hubsync follow --server null://localhost
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any
from urllib.parse import urlsplit

from .server import InferenceServer, checked_url
from .vllm_http import VLLMServer

GROUP = "hubsync.inference_engines"
_BUILT_IN: dict[str, Any] = {"http": VLLMServer, "https": VLLMServer}


def connect(url: str, api_key: str | None = None, *, timeout: float = 120.0) -> InferenceServer:
    """The client of the server at `url`. Sends nothing.

    Args:
        api_key: the server's API key, if it has one. vLLM's client takes `VLLM_API_KEY` of the environment by default.
        timeout: seconds to wait for any one answer.

    Raises:
        ConfigError: not a URL of a known scheme.
    """
    url = checked_url(url, schemes())
    scheme = urlsplit(url).scheme
    client = _BUILT_IN.get(scheme) or _registered()[scheme].load()
    server: InferenceServer = client(url, api_key, timeout=timeout)
    return server


def schemes() -> tuple[str, ...]:
    """URL schemes of all known inference engines."""
    return (*_BUILT_IN, *_registered())


def _registered() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}
