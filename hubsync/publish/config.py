"""Settings of a publisher."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType, NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from hubsync.errors import ConfigError, without_users
from hubsync.format.encoding import Encoding
from hubsync.replicas.engines import schemes
from hubsync.replicas.server import plain_url, shown

_LONGEST_S = 1e6  # seconds; waiting functions do not take infinity

ViewDtype = Literal["bfloat16", "float16", "float32"]
DeltaEncoding = Literal["fast", "compact"]
_SECRETS = ("token", "signing_key", "api_key")
VIEW_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in get_args(ViewDtype)}


@dataclass(repr=False)
class SyncConfig:
    r"""
    Configuration class for [`DeltaWeightTransferEngine`].

    Using [`~transformers.HfArgumentParser`] or [`~trl.TrlParser`] we can turn this class into
    [argparse](https://docs.python.org/3/library/argparse#module-argparse) arguments that can be specified on the
    command line. Their help is the text below; their types and choices are the annotations.

    Parameters:
        > Parameters that control the run

        bucket (`str`):
            Address of the run: `hf://buckets/<namespace>/<name>/<run>`, or a directory. It is created if it does not
            exist.
        resume (`bool`, *optional*, defaults to `True`):
            Whether to continue the run if the bucket already holds one with the same tensors. If `False`, an existing
            run is an error.
        token (`str`, *optional*):
            Hugging Face token. Defaults to the one of the environment or of `hf auth login`.
        signing_key (`str`, *optional*):
            File of a key made by `hubsync keygen`. Every document of the run is signed with it, and servers with the
            public key reject unsigned documents. Defaults to the environment variable `HUBSYNC_SIGNING_KEY`; without
            it nothing is signed.
        name (`str`, *optional*):
            Free text recorded with every version, shown by `hubsync ls`.

        > Parameters that control what is published

        view_dtype (`str`, *optional*, defaults to `"bfloat16"`):
            Dtype of the weights on the inference servers: `"bfloat16"`, `"float16"` or `"float32"`. Parameters are
            cast to it before they are compared.
        encoding (`str`, *optional*, defaults to `"fast"`):
            Encoding of deltas: `"fast"`; or `"compact"`, a third smaller or less, decodable only with the previous
            version's weights, with one more pass over them to encode and to decode.
        detector (`str`, *optional*, defaults to `"auto"`):
            How changes are detected: `"sliced"`, in the optimizer's steps, without a copy of the weights (for
            optimizers known to update each parameter by itself, and the fast encoding); `"snapshot"`, by comparing all
            weights with a copy of the published ones; or `"auto"`, sliced where it can be exact.
        base_model (`str`, *optional*):
            Hub repository or directory of the checkpoint that the model was loaded from, which the servers load too.
            Defaults to the one in the model's config; without one, the whole model is uploaded once.
        base_revision (`str`, *optional*):
            Commit of `base_model`. Defaults to the one in the model's config.
        snapshot_device (`str`, *optional*, defaults to `"model"`):
            Device of the snapshot detector's copy of the weights: `"model"` (the device of each parameter) or `"cpu"`
            (saves accelerator memory, but moves the whole model at every publish).

        > Parameters that control anchors and merged deltas

        anchor_every (`int`, *optional*, defaults to `0`):
            Upload the whole model after every n-th version, so that servers without the base checkpoint, or far
            behind, catch up sooner. `0` uploads it only on request or when needed.
        anchor_fraction (`float`, *optional*, defaults to `0.0`):
            Upload the whole model when catching up from its last upload, by deltas or merged deltas, takes more than
            this fraction of its bytes. `0.0` never does; `0.5` bounds the download of a late server to one and a half
            models.
        anchor_at_close (`bool`, *optional*, defaults to `False`):
            Whether to upload the whole model when the engine is closed.
        compaction (`bool`, *optional*, defaults to `False`):
            Whether to merge deltas between publishes, in the background of rank 0, so that a server far behind
            downloads few of them. `hubsync compact --watch` does the same in another process.

        > Parameters that control the inference servers

        servers (`list[str]`, *optional*, defaults to `[]`):
            URLs of the vLLM servers on which `sync` commits each version, for example `http://localhost:8000`. Other
            servers may follow the bucket by themselves.
        api_key (`str`, *optional*):
            The servers' `--api-key`, or the token that the proxy in front of them wants (a private Space, a port of HF
            Jobs, a gateway); it is sent to all of `servers`. Defaults to the environment variable `VLLM_API_KEY`. User
            and password of a server's URL go first.
        quorum (`int`, *optional*, defaults to `0`):
            Number of `servers` that must be ready for a version before `sync` commits it on them. The others commit
            as soon as they are ready. `0` waits for all.
        kv_cache (`str`, *optional*, defaults to `"keep"`):
            Treatment of the keys and values of running requests when weights change: `"keep"` them (these requests mix
            old and new to their end), or `"recompute"` them with the new weights. With both, later requests never use
            keys and values of old weights.
        stage_timeout (`float`, *optional*, defaults to `600.0`):
            Seconds a server may take to find its position in the run, or to download and prepare a version.
        commit_timeout (`float`, *optional*, defaults to `120.0`):
            Seconds a server may take to answer one request while it commits.
    """

    bucket: str = ""
    resume: bool = True
    token: str | None = None
    signing_key: str | None = None
    name: str | None = None

    view_dtype: ViewDtype = "bfloat16"
    encoding: DeltaEncoding = "fast"
    detector: Literal["auto", "sliced", "snapshot"] = "auto"
    base_model: str | None = None
    base_revision: str | None = None
    snapshot_device: Literal["model", "cpu"] = "model"

    anchor_every: int = 0
    anchor_fraction: float = 0.0
    anchor_at_close: bool = False
    compaction: bool = False

    servers: list[str] = field(default_factory=list)
    api_key: str | None = None
    quorum: int = 0
    kv_cache: Literal["recompute", "keep"] = "keep"
    stage_timeout: float = 600.0
    commit_timeout: float = 120.0

    @property
    def dtype(self) -> torch.dtype:
        """`view_dtype` as a torch dtype."""
        return VIEW_DTYPES[self.view_dtype]

    def __post_init__(self) -> None:
        if isinstance(self.bucket, os.PathLike):
            self.bucket = os.fspath(self.bucket)
        if isinstance(self.base_model, os.PathLike):
            self.base_model = os.fspath(self.base_model)
        for setting, annotation in get_type_hints(SyncConfig).items():
            _require_type(setting, getattr(self, setting), annotation)
        if not self.bucket.strip():
            raise ConfigError(
                "SyncConfig needs a bucket: hf://buckets/<namespace>/<name>/<run>, or a directory such as ./runs/first"
            )
        if self.detector == "sliced" and Encoding(self.encoding).needs_base:
            raise ConfigError(
                "encoding='compact' needs the previous version's weights, and detector='sliced' keeps no copy of them: "
                "use encoding='fast', or detector='snapshot'"
            )
        if self.name is not None and (len(self.name) > 512 or not self.name.isprintable()):
            raise ConfigError("name must be printable text of at most 512 characters")
        if self.base_revision is not None and self.base_model is None:
            raise ConfigError("base_revision needs base_model, the repository that it is a revision of")
        self._require_ranges()
        self._require_servers()

    def __repr__(self) -> str:
        """All settings. Configs are logged, so secrets that are set, and users of URLs, are shown as `***`."""
        shown_as = {name: "***" for name in _SECRETS if getattr(self, name) is not None}
        shown_as["servers"] = repr([shown(url) for url in self.servers])
        values = (f"{name}={shown_as.get(name) or without_users(repr(value))}" for name, value in vars(self).items())
        return f"{type(self).__name__}({', '.join(values)})"

    def _require_ranges(self) -> None:
        if self.anchor_every < 0:
            raise ConfigError(f"anchor_every must be 0 (never) or a number of versions, not {self.anchor_every}")
        if not 0 <= self.anchor_fraction < _LONGEST_S:
            raise ConfigError(f"anchor_fraction must be 0 (never) or a positive number, not {self.anchor_fraction}")
        if not (0 < self.stage_timeout < _LONGEST_S and 0 < self.commit_timeout < _LONGEST_S):
            raise ConfigError("stage_timeout and commit_timeout must be positive numbers of seconds")

    def _require_servers(self) -> None:
        for url in self.servers:
            scheme, separator, _ = url.partition("://")
            if not separator:
                raise ConfigError(f"server {shown(url)!r} is not a URL; write it as http://{shown(url)}")
            if scheme not in schemes():
                raise ConfigError(f"server {shown(url)!r}: no inference engine for {scheme}:// is installed")
        if len({plain_url(url) for url in self.servers}) < len(self.servers):
            raise ConfigError("servers names one server twice")
        if not 0 <= self.quorum <= len(self.servers):
            raise ConfigError(f"quorum must be 0 (all servers) or at most {len(self.servers)}, the number of servers")


def _require_type(setting: str, value: Any, annotation: Any) -> None:
    """ConfigError unless a value has the type of its annotation: values from a YAML file may have any type."""
    if get_origin(annotation) is Literal:
        choices = get_args(annotation)
        if value not in choices:
            raise ConfigError(f"{setting} must be one of {', '.join(choices)}, not {value!r}")
        return
    if get_origin(annotation) is list:
        if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(url, str) for url in value):
            given = shown(value) if isinstance(value, str) else value
            raise ConfigError(
                f"{setting} must be a list of URLs, such as {setting}=['http://localhost:8000'], not {given!r}"
            )
        return
    kinds = get_args(annotation) or (annotation,)
    accepted = (*kinds, int) if float in kinds else kinds
    if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in kinds):
        names = " or ".join("None" if kind is NoneType else kind.__name__ for kind in kinds)
        given = type(value).__name__ if setting in _SECRETS else repr(value)
        raise ConfigError(f"{setting} must be {names}, not {given}")


def _texts_of_parameters(docstring: str) -> dict[str, str]:
    """Parameter name -> its text, in a docstring with `name (type):` lines."""
    entries = re.findall(r"^    (\w+) \(`.*\):\n((?:        .*\n?)+)", inspect.cleandoc(docstring), re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _describe_fields() -> None:
    """Make the docstring the help of command line arguments: `HfArgumentParser` reads it from field metadata."""
    texts = _texts_of_parameters(SyncConfig.__doc__ or "")
    for setting in fields(SyncConfig):
        setting.metadata = MappingProxyType({"help": texts.get(setting.name, "").replace("%", "%%")})


_describe_fields()
