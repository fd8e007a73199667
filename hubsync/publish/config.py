"""The settings of a publisher."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import NoneType

import torch

from hubsync.apply.protocol import KV_POLICIES, KvPolicy
from hubsync.errors import ConfigError
from hubsync.format.encoding import Encoding

_FOREVER = 1e6  # seconds; waiting functions take no infinity
_TYPES: dict[str, tuple[type, ...]] = {
    "bucket": (str,),
    "resume": (bool,),
    "token": (str, NoneType),
    "signing_key": (str, NoneType),
    "name": (str, NoneType),
    "base_model": (str, NoneType),
    "base_revision": (str, NoneType),
    "audit_every": (int,),
    "anchor_every": (int,),
    "anchor_fraction": (int, float),
    "anchor_at_close": (bool,),
    "compaction": (bool,),
    "servers": (Sequence,),
    "quorum": (int,),
    "stage_timeout": (int, float),
    "commit_timeout": (int, float),
}

VIEW_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass
class SyncConfig:
    r"""
    Configuration class for [`DeltaWeightTransferEngine`].

    Using [`~transformers.HfArgumentParser`] or [`~trl.TrlParser`] we can turn this class into
    [argparse](https://docs.python.org/3/library/argparse#module-argparse) arguments that can be specified on the
    command line.

    Parameters:
        > Parameters that control the run

        bucket (`str`):
            Where the run lives: `hf://buckets/<namespace>/<name>/<run>`, or a directory. It is created if it does not
            exist.
        resume (`bool`, *optional*, defaults to `True`):
            Whether to continue the run if the bucket already holds one of the same tensors. If `False`, an existing
            run is an error.
        token (`str`, *optional*):
            Hugging Face token. Defaults to the one of the environment or of `hf auth login`.
        signing_key (`str`, *optional*):
            File of a key that `hubsync keygen` made; every document of the run is signed with it, and servers that are
            given the public key refuse all others. Defaults to `HUBSYNC_SIGNING_KEY`, else nothing is signed.
        name (`str`, *optional*):
            Free text recorded with every version, shown by `hubsync ls`.

        > Parameters that control what is published

        view_dtype (`str`, *optional*, defaults to `"bfloat16"`):
            Dtype that the inference servers hold the weights in: `"bfloat16"`, `"float16"` or `"float32"`. Parameters
            are cast to it before they are compared.
        encoding (`str`, *optional*, defaults to `"fast"`):
            How deltas are encoded: `"fast"`; or `"compact"`, a third smaller or less, decodable only with the
            previous version's weights, with one more pass over them to encode and to decode.
        detector (`str`, *optional*, defaults to `"auto"`):
            How changes are found: `"sliced"`, in the optimizer's steps, without a copy of the weights (for optimizers
            known to update each parameter by itself, and the fast level); `"snapshot"`, by comparing all weights with
            a copy of the published ones; or `"auto"`, sliced where it can be exact.
        audit_every (`int`, *optional*, defaults to `20`):
            With the sliced detector, recompute the digest of all weights at each so many publishes, at the first one
            and when the engine is closed: weights written to outside of the optimizer's steps are then uploaded
            whole. `0` for the first one and the end only.
        base_model (`str`, *optional*):
            Hub repository or directory of the checkpoint that the model was loaded from, which the servers load too.
            Defaults to what the model's config says; if that is nothing, the whole model is uploaded once.
        base_revision (`str`, *optional*):
            Commit of `base_model`. Defaults to what the model's config says.
        snapshot_device (`str`, *optional*, defaults to `"model"`):
            Where the copy of the published weights is held that changes are found against: `"model"` (beside each
            parameter) or `"cpu"` (saves accelerator memory, but moves the whole model at every publish).

        > Parameters that control anchors and merged deltas

        anchor_every (`int`, *optional*, defaults to `0`):
            Upload the whole model after every so many versions, so that servers without the base checkpoint, or far
            behind, catch up sooner. `0` uploads it only when it is asked for or needed.
        anchor_fraction (`float`, *optional*, defaults to `0.0`):
            Upload the whole model once catching up from its last upload, by deltas or merged deltas, takes more than
            this fraction of its bytes. `0.0` never does; `0.5` bounds what a late server downloads to one and a half
            models.
        anchor_at_close (`bool`, *optional*, defaults to `False`):
            Whether to upload the whole model when the engine is closed.
        compaction (`bool`, *optional*, defaults to `False`):
            Whether to merge deltas between publishes, in the background of rank 0, so that a server far behind
            downloads few of them: what `hubsync compact --watch` does elsewhere.

        > Parameters that control the inference servers

        servers (`list[str]`, *optional*, defaults to `[]`):
            URLs of the vLLM servers that `sync` brings to each version, for example `http://localhost:8000`. Others
            may follow the bucket by themselves.
        quorum (`int`, *optional*, defaults to `0`):
            How many of `servers` have to be ready for a version before `sync` commits it on them; the others follow
            as soon as they are. `0` waits for all.
        kv_cache (`str`, *optional*, defaults to `"recompute"`):
            What happens to the keys and values of running requests when weights change: `"recompute"` them with the
            new weights, or `"keep"` them (these requests mix old and new to their end). Requests that come later never
            see keys and values of old weights, with either.
        stage_timeout (`float`, *optional*, defaults to `600.0`):
            Seconds a server may take to find its place in the run, or to download and prepare a version.
        commit_timeout (`float`, *optional*, defaults to `120.0`):
            Seconds a server may take to answer one request while it commits.
    """

    # Parameters that control the run
    bucket: str = field(
        default="",
        metadata={"help": "Where the run lives: `hf://buckets/<namespace>/<name>/<run>`, or a directory."},
    )
    resume: bool = field(
        default=True,
        metadata={"help": "Whether to continue a run of the same tensors. If `False`, an existing run is an error."},
    )
    token: str | None = field(
        default=None,
        repr=False,  # who logs a config does not log this
        metadata={"help": "Hugging Face token. Defaults to the one of the environment or of `hf auth login`."},
    )
    signing_key: str | None = field(
        default=None,
        metadata={
            "help": "File of a key that `hubsync keygen` made, to sign the run with. Defaults to HUBSYNC_SIGNING_KEY."
        },
    )
    name: str | None = field(
        default=None, metadata={"help": "Free text recorded with every version, shown by `hubsync ls`."}
    )

    # Parameters that control what is published
    view_dtype: str = field(
        default="bfloat16",
        metadata={
            "help": "Dtype that the inference servers hold the weights in. Parameters are cast to it before they are "
            "compared.",
            "choices": list(VIEW_DTYPES),
        },
    )
    encoding: str = field(
        default="fast",
        metadata={
            "help": "How deltas are encoded: `fast`; or `compact`, a third smaller, with one more pass over all "
            "weights to encode and to decode.",
            "choices": ["fast", "compact"],
        },
    )
    detector: str = field(
        default="auto",
        metadata={
            "help": "How changes are found: `sliced`, in the optimizer's steps, without a copy of the weights; "
            "`snapshot`, by comparing all weights with a copy; or `auto`, sliced where it can be exact.",
            "choices": ["auto", "sliced", "snapshot"],
        },
    )
    audit_every: int = field(
        default=20,
        metadata={
            "help": "With the sliced detector, recompute the digest of all weights at each so many publishes, at the "
            "first one and when the engine is closed. `0` for the first one and the end only."
        },
    )
    base_model: str | None = field(
        default=None,
        metadata={
            "help": "Hub repository or directory of the checkpoint that the model was loaded from, which the servers "
            "load too. Defaults to what the model's config says; if that is nothing, the whole model is uploaded once."
        },
    )
    base_revision: str | None = field(
        default=None, metadata={"help": "Commit of `base_model`. Defaults to what the model's config says."}
    )
    snapshot_device: str = field(
        default="model",
        metadata={
            "help": "Where the copy of the published weights is held that changes are found against: beside each "
            "parameter, or in main memory.",
            "choices": ["model", "cpu"],
        },
    )

    # Parameters that control anchors and merged deltas
    anchor_every: int = field(
        default=0,
        metadata={
            "help": "Upload the whole model after every so many versions. `0` uploads it only when it is asked for or "
            "needed."
        },
    )
    anchor_fraction: float = field(
        default=0.0,
        metadata={
            "help": "Upload the whole model once catching up from its last upload takes more than this fraction of its "
            "bytes. `0.0` never does."
        },
    )
    anchor_at_close: bool = field(
        default=False, metadata={"help": "Whether to upload the whole model when the engine is closed."}
    )
    compaction: bool = field(
        default=False,
        metadata={
            "help": "Whether to merge deltas between publishes, in the background, so that a server far behind "
            "downloads few of them."
        },
    )

    # Parameters that control the inference servers
    servers: list[str] = field(
        default_factory=list,
        metadata={"help": "URLs of the vLLM servers that `sync` brings to each version."},
    )
    quorum: int = field(
        default=0,
        metadata={
            "help": "How many of `servers` have to be ready for a version before `sync` commits it on them. `0` waits "
            "for all."
        },
    )
    kv_cache: str = field(
        default=KvPolicy.RECOMPUTE,
        metadata={
            "help": "What happens to the keys and values of running requests when weights change.",
            "choices": list(KV_POLICIES),
        },
    )
    stage_timeout: float = field(
        default=600.0,
        metadata={
            "help": "Seconds a server may take to find its place in the run, or to download and prepare a version."
        },
    )
    commit_timeout: float = field(
        default=120.0, metadata={"help": "Seconds a server may take to answer one request while it commits."}
    )

    @property
    def dtype(self) -> torch.dtype:
        """`view_dtype` as a torch dtype."""
        return VIEW_DTYPES[self.view_dtype]

    def __post_init__(self) -> None:
        if isinstance(self.bucket, os.PathLike):
            self.bucket = os.fspath(self.bucket)
        if isinstance(self.base_model, os.PathLike):
            self.base_model = os.fspath(self.base_model)
        self._require_types()
        if not self.bucket.strip():
            raise ConfigError(
                "SyncConfig needs a bucket: hf://buckets/<namespace>/<name>/<run>, or a directory such as ./runs/first"
            )
        self._require_choice("view_dtype", *VIEW_DTYPES)
        self._require_choice("encoding", "fast", "compact")
        self._require_choice("snapshot_device", "model", "cpu")
        self._require_choice("detector", "auto", "sliced", "snapshot")
        if self.detector == "sliced" and Encoding(self.encoding).needs_base:
            raise ConfigError(
                "encoding='compact' encodes against the weights before, and detector='sliced' keeps no copy of them: "
                "use encoding='fast', or detector='snapshot'"
            )
        if self.audit_every < 0:
            raise ConfigError(f"audit_every must be 0 or a number of publishes, not {self.audit_every}")
        self._require_choice("kv_cache", *KV_POLICIES)
        if self.anchor_every < 0:
            raise ConfigError(f"anchor_every must be 0 (never) or a number of versions, not {self.anchor_every}")
        if not 0 <= self.anchor_fraction < _FOREVER:
            raise ConfigError(f"anchor_fraction must be 0 (never) or a positive number, not {self.anchor_fraction}")
        if not (0 < self.stage_timeout < _FOREVER and 0 < self.commit_timeout < _FOREVER):
            raise ConfigError("stage_timeout and commit_timeout must be positive numbers of seconds")
        for url in self.servers:
            if not url.startswith(("http://", "https://")):
                raise ConfigError(f"server {url!r} is not a URL; write it as http://{url}")
        if len({url.rstrip("/") for url in self.servers}) < len(self.servers):
            raise ConfigError("servers names one server twice")
        if not 0 <= self.quorum <= len(self.servers):
            raise ConfigError(f"quorum must be 0 (all servers) or at most the {len(self.servers)} servers there are")
        if self.name is not None and (len(self.name) > 512 or not self.name.isprintable()):
            raise ConfigError("name must be printable text of at most 512 characters")
        if self.base_revision is not None and self.base_model is None:
            raise ConfigError("base_revision needs base_model: a revision of what?")

    def _require_types(self) -> None:
        """Values from a YAML file may be of any type."""
        for setting, kinds in _TYPES.items():
            value = getattr(self, setting)
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                raise ConfigError(f"{setting} must be {' or '.join(kind.__name__ for kind in kinds)}, not {value!r}")
        if isinstance(self.servers, str) or not all(isinstance(url, str) for url in self.servers):
            raise ConfigError(
                f"servers must be a list of URLs, such as servers=['http://localhost:8000'], not {self.servers!r}"
            )

    def _require_choice(self, setting: str, *choices: str) -> None:
        if getattr(self, setting) not in choices:
            raise ConfigError(f"{setting} must be one of {', '.join(choices)}, not {getattr(self, setting)!r}")
