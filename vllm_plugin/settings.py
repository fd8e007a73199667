"""Settings of a server, pinned when it is started: environment variables and `--additional-config`, parsed once.

`--additional-config '{"hubsync": {"bucket": ...}}'` beats the environment:

    bucket          HUBSYNC_BUCKET          address of the run
    cache           HUBSYNC_CACHE           directory for downloads
    public_key      HUBSYNC_PUBLIC_KEY      reject documents that this key has not signed
    max_head_age    HUBSYNC_MAX_HEAD_AGE    seconds; refuse to join a run with an older head
    dense_fallback  HUBSYNC_DENSE_FALLBACK  load tensors whole that cannot be followed in place
    lora_name       HUBSYNC_LORA_NAME       name of the adapter in requests, by default `policy`
    window_timeout  HUBSYNC_WINDOW_TIMEOUT  seconds after which an open commit window counts as abandoned
    kv_cache        HUBSYNC_KV_CACHE        policy of commits through vLLM's own weight transfer calls
    verify_share    HUBSYNC_VERIFY_SHARE    share of the time for verifying served weights again: 0.02 is 2 %, 0 never

Importing this module imports neither vLLM nor torch.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubsync.apply.engine import RunSource
from hubsync.apply.protocol import KV_POLICIES, VERIFY_SHARE, WINDOW_TIMEOUT_S, KvPolicy
from hubsync.cache import default_cache
from hubsync.errors import ConfigError
from hubsync.format.keys import PUBLIC_KEY_VARIABLE, PublicKey

_VARIABLES = {
    "bucket": "HUBSYNC_BUCKET",
    "cache": "HUBSYNC_CACHE",
    "dense_fallback": "HUBSYNC_DENSE_FALLBACK",
    "kv_cache": "HUBSYNC_KV_CACHE",
    "lora_name": "HUBSYNC_LORA_NAME",
    "max_head_age": "HUBSYNC_MAX_HEAD_AGE",
    "public_key": PUBLIC_KEY_VARIABLE,
    "verify_share": "HUBSYNC_VERIFY_SHARE",
    "window_timeout": "HUBSYNC_WINDOW_TIMEOUT",
}
_STRICT = ("dense_fallback", "max_head_age", "public_key", "verify_share")  # an empty value beats the environment too
_LORA_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")


@dataclass(frozen=True)
class Settings:
    """What is pinned at launch. Get one from `read_settings`.

    Attributes:
        bucket: address of the run; None if none is configured.
        cache: directory for downloads.
        public_key: as configured; loaded by `source`.
        max_head_age: seconds, or None.
        dense_fallback: may tensors be loaded whole that cannot be followed in place?
        lora_name: of the adapter in requests.
        window_timeout: seconds.
        kv_cache: one of `KV_POLICIES`.
        verify_share: of the time, from 0 to 1.
        ignored: one sentence for each mistyped setting that is replaced by its default. These must not keep a server
            from reporting its errors.
        error: the first mistyped setting that keeps workers from following a run.
    """

    bucket: str | None
    cache: Path
    public_key: str | None
    max_head_age: float | None
    dense_fallback: bool
    lora_name: str
    window_timeout: float
    kv_cache: str
    verify_share: float
    ignored: tuple[str, ...] = ()
    error: ConfigError | None = None

    def source(self) -> RunSource:
        """Where workers read the run from. ConfigError if a setting is mistyped, or no bucket is configured."""
        self.check()
        assert self.bucket is not None
        key = None if self.public_key is None else PublicKey.load(self.public_key)
        return RunSource(self.bucket, self.cache, key, self.max_head_age)

    def check(self) -> None:
        """ConfigError if a setting is mistyped, or no bucket is configured."""
        if self.error is not None:
            raise self.error
        if self.bucket is None:
            raise ConfigError(
                "this server does not know which run to follow: start it with HUBSYNC_BUCKET=hf://buckets/<namespace>/"
                "<name>/<run> (or a directory) in its environment, or with "
                '--additional-config \'{"hubsync": {"bucket": "..."}}\''
            )


def read_settings(config: Any) -> Settings:
    """The settings of a server.

    Args:
        config: vLLM's configuration; its `additional_config` is read, and the environment.
    """
    extra = config.additional_config if isinstance(config.additional_config, dict) else {}
    pinned = extra.get("hubsync", {})
    errors: list[str] = []
    ignored: list[str] = []
    if not isinstance(pinned, dict) or not pinned.keys() <= _VARIABLES.keys():
        errors.append(
            f"--additional-config: hubsync must be an object with some of {', '.join(sorted(_VARIABLES))}, "
            f"not {pinned!r:.200}"
        )
        pinned = pinned if isinstance(pinned, dict) else {}
    values = {
        name: pinned[name] if pinned.get(name) or (name in pinned and name in _STRICT) else os.environ.get(variable)
        for name, variable in _VARIABLES.items()
    }

    def seconds(name: str) -> float | None:
        number = _seconds(values[name])
        if number is None:
            wrong = f"{name} ({_VARIABLES[name]}) must be a number of seconds above 0, not {values[name]!r:.80}"
            (errors if name == "max_head_age" else ignored).append(wrong)
        return number

    max_head_age = None if values["max_head_age"] is None else seconds("max_head_age")
    window_timeout = (seconds("window_timeout") if values["window_timeout"] else None) or WINDOW_TIMEOUT_S
    kv_cache = values["kv_cache"] or KvPolicy.DEFAULT
    if kv_cache not in KV_POLICIES:
        ignored.append(f"kv_cache must be one of {', '.join(KV_POLICIES)}, not {kv_cache!r}")
        kv_cache = KvPolicy.DEFAULT
    lora_name = str(values["lora_name"] or "policy")
    if not _LORA_NAME.fullmatch(lora_name):
        errors.append(f"lora_name must be letters, digits and . _ / -, at most 128, not {lora_name!r:.80}")
    return Settings(
        bucket=str(values["bucket"]) if values["bucket"] else None,
        cache=Path(values["cache"] or default_cache()),
        public_key=None if values["public_key"] is None else str(values["public_key"]),
        max_head_age=max_head_age,
        dense_fallback=_flag(values["dense_fallback"]),
        lora_name=lora_name,
        window_timeout=window_timeout,
        kv_cache=str(kv_cache),
        verify_share=_share(values["verify_share"], ignored),
        ignored=tuple(ignored),
        error=ConfigError(errors[0]) if errors else None,
    )


def _flag(value: Any) -> bool:
    """Of the environment, only `1` and `true` are true."""
    return value in ("1", "true") if isinstance(value, str) else bool(value)


def _share(value: Any, ignored: list[str]) -> float:
    """A number from 0 to 1; the default, with a sentence in `ignored`, for anything else."""
    if value is None:
        return VERIFY_SHARE
    try:
        share = float(value)
    except (TypeError, ValueError):
        share = -1.0
    if 0 <= share <= 1:
        return share
    ignored.append(f"verify_share (HUBSYNC_VERIFY_SHARE) must be a number from 0 to 1, not {value!r:.80}")
    return VERIFY_SHARE


def _seconds(value: Any) -> float | None:
    """A positive, finite number; None for anything else."""
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        return None
    return seconds if 0 < seconds < float("inf") else None
