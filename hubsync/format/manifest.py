"""The three JSON documents of a run: `Run`, `Manifest`, `Head`. Parsing them is a trust boundary.

* `run.json` fixes what never changes: run id, tensor table, base model, digest of version 0.
* A manifest is the immutable commit record of one delta, anchor or merged delta. A version exists when its manifest
  does.
* `head.json` is the only mutable file, and only a hint: readers keep a high-water mark.

Every field is checked for type and range before use. No path is read from a document: `hubsync.chain.Layout` derives
object names from (epoch, version, rank, hash). Unknown *fields* are ignored, so that fields can be added. An unknown
`format` is an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from hubsync.errors import FormatError

from .documents import FORMAT, MAX_BYTES, MAX_TABLE_BYTES, Fields, canonical, seal, unseal, versioned
from .encoding import Encoding
from .table import TensorTable
from .times import Times

KINDS = ("delta", "anchor", "merged")
MAX_VERSION = 10**8 - 1  # object names hold eight digits
MAX_PARTS = 1 << 16
MAX_PART_BYTES = 1 << 40

# Files of an anchor other than weights: `from_pretrained` and `vllm serve` need them.
SIDE_FILES = frozenset(
    {
        "config.json",
        "adapter_config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "tiktoken.model",
        "tekken.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
        "chat_template.json",
        "preprocessor_config.json",
        "video_preprocessor_config.json",
        "processor_config.json",
        "model.safetensors.index.json",
    }
)

_HEX128 = re.compile(r"[0-9a-f]{32}")
_HEX256 = re.compile(r"[0-9a-f]{64}")
_RUN_ID = re.compile(r"[0-9a-f]{32}")
_EPOCH = re.compile(r"\d{8}-[0-9a-f]{8}")
_COMPACTOR = re.compile(r"compact-[0-9a-f]{8}")
_SHARD = re.compile(r"(adapter_)?model(-\d{5}-of-\d{5})?\.safetensors")


@dataclass(frozen=True, order=True)
class Position:
    """A point of a chain: a version and the digest (32 hex digits) of the view at that version."""

    version: int
    digest: str

    def __str__(self) -> str:
        return f"version {self.version} ({self.digest[:12]})"


@dataclass(frozen=True)
class Part:
    """One immutable object of a version.

    Attributes:
        size: bytes.
        sha256: hex digest of the bytes, checked on every download.
        rank: publisher rank that wrote it (deltas); 0 for anchors.
        file: for anchors, the file name inside the anchor directory: `model*.safetensors` or one of `SIDE_FILES`.
    """

    size: int
    sha256: str
    rank: int = 0
    file: str | None = None


@dataclass(frozen=True)
class Manifest:
    """The commit record of one delta, merged delta or anchor.

    A delta changes the view at `parent` into the view at `position`. So does a merged delta, over several versions. An
    anchor *is* the view at `position` and has no parent. If a version has both a delta and an anchor, both have the
    same digest.

    Attributes:
        kind: "delta", "merged" or "anchor".
        run_id: the run that this belongs to.
        table_hash: hash of the run's tensor table.
        epoch: writer epoch that wrote it, `00000003-1a2b3c4d`; for a merged delta the compactor, `compact-5e6f7a8b`.
        position: version and digest after this.
        parent: version and digest that a delta applies to; None for an anchor.
        parent_epoch: writer epoch of the parent version's manifest; None for an anchor, or if the parent is version 0.
        parts: immutable objects, in rank order.
        changed: elements that differ between parent and position (0 for an anchor).
        created: seconds since 1970, the publisher's clock; information only.
        step: the trainer's step, if known.
        name: free text of the user, shown by `hubsync ls`.
        encoding: of the parts.
        absolute: number of tensors of which a delta holds new values instead of changes. Unless it is 0, the delta
            cannot be undone.
        times: when the version was detected, encoded and uploaded.
        serve: version that replicas should serve when this was committed; None for this version. The head may name
            another version later. Readers fall back to this field if the head is missing or invalid.
        expires: seconds since 1970, after which retention may delete the version; None for never.
    """

    kind: str
    run_id: str
    table_hash: str
    epoch: str
    position: Position
    parent: Position | None
    parent_epoch: str | None
    parts: tuple[Part, ...]
    changed: int
    created: float
    step: int | None = None
    name: str | None = None
    encoding: Encoding = Encoding.FAST
    serve: int | None = None
    expires: float | None = None
    absolute: int = 0
    times: Times | None = None
    format: str = FORMAT

    @property
    def version(self) -> int:
        return self.position.version

    @property
    def invertible(self) -> bool:
        """Whether the parts alone lead back from the version to its parent."""
        return self.encoding.invertible and self.absolute == 0

    @property
    def served(self) -> int:
        """The version that replicas should serve when this was committed."""
        return self.version if self.serve is None else self.serve

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.size for part in self.parts)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def dumps(self) -> bytes:
        return seal(self.to_json(), MAX_BYTES // 2)  # the head embeds it

    @classmethod
    def from_json(cls, doc: object) -> Manifest:
        """Parse the JSON object; FormatError on anything unexpected."""
        what = "manifest"
        known = _known_fields(cls, versioned(doc, what), what)
        of = Fields(known, what)
        kind = of.choice("kind", KINDS)
        position = _position(known["position"], what)
        parent = _position(known["parent"], what) if of.has("parent") else None
        parent_epoch = of.match("parent_epoch", _EPOCH) if of.has("parent_epoch") else None
        _check_order(kind, position, parent, parent_epoch)
        return cls(
            kind=kind,
            run_id=of.match("run_id", _RUN_ID),
            table_hash=of.match("table_hash", _HEX256),
            epoch=of.match("epoch", _COMPACTOR if kind == "merged" else _EPOCH),
            position=position,
            parent=parent,
            parent_epoch=parent_epoch,
            parts=_parts(known["parts"], kind, what),
            changed=of.integer("changed", 0, 1 << 62),
            created=of.seconds("created"),
            step=of.integer("step", 0, 1 << 62) if of.has("step") else None,
            name=of.text("name", 512) if of.has("name") else None,
            encoding=Encoding(of.choice("encoding", tuple(Encoding))),
            serve=of.integer("serve", 0, position.version) if of.has("serve") else None,
            expires=of.seconds("expires") if of.has("expires") else None,
            absolute=of.integer("absolute", 0, 1 << 32) if of.has("absolute") else 0,
            times=Times.from_json(known["times"]) if of.has("times") else None,
        )

    @classmethod
    def loads(cls, data: bytes) -> Manifest:
        return cls.from_json(unseal(data, "manifest"))


@dataclass(frozen=True)
class Base:
    """Source of version 0. It is referenced, and uploaded only if no other copy exists.

    Attributes:
        model: Hub repository or local path that the trainer loaded, as in `vllm serve MODEL`; None if the model was
            made in memory. Then the bucket has an anchor of version 0.
        revision: commit of the repository, if known.
    """

    model: str | None = None
    revision: str | None = None


# Allowed fields of an adapter's config, with PEFT's names. All others are dropped.
ADAPTER_FIELDS = (
    "alpha_pattern",
    "base_model_name_or_path",
    "bias",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "peft_type",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "task_type",
    "use_dora",
    "use_rslora",
)
_MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True)
class Adapter:
    """Settings of a run that publishes a LoRA adapter. Its view holds the adapter's tensors and none of the model's.

    Attributes:
        config: PEFT's `adapter_config.json`, restricted to `ADAPTER_FIELDS`: rank (`r`), `lora_alpha`, ... The same
            for all versions.
        base: the model that it adapts.
        base_digest: digest (32 hex digits) of that model's tensors, cast to the view's dtype; None where it was not
            computed (quantised or sharded).
    """

    config: Mapping[str, Any]
    base: Base
    base_digest: str | None = None

    @classmethod
    def from_json(cls, doc: object) -> Adapter:
        """Parse the JSON object; FormatError on anything unexpected."""
        what = "run.json: adapter"
        if not isinstance(doc, dict) or not isinstance(doc.get("config"), dict):
            raise FormatError(f"{what}: expected an object with a config")
        config = {key: value for key, value in doc["config"].items() if key in ADAPTER_FIELDS}
        if len(canonical(config)) > _MAX_CONFIG_BYTES:
            raise FormatError(f"{what}: its config is larger than {_MAX_CONFIG_BYTES} bytes")
        Fields(config, what).integer("r", 1, 1 << 16)
        of = Fields(doc, what)
        digest = of.match("base_digest", _HEX128) if of.has("base_digest") else None
        return cls(config, _base(doc.get("base"), what), digest)


@dataclass(frozen=True)
class Run:
    """`run.json`, written once: what every publisher and replica of a run agrees on.

    Attributes:
        run_id: 32 hex digits.
        table: the tensors of the published view.
        digest: of version 0, 32 hex digits.
        base: source of version 0.
        created: seconds since 1970, the publisher's clock.
        public_key: key (64 hex digits) that signs all documents of the run; None if they are not signed.
        adapter: set if the published view is an adapter; None if it is the whole model.
    """

    run_id: str
    table: TensorTable
    digest: str
    base: Base = field(default_factory=Base)
    created: float = 0.0
    public_key: str | None = None
    adapter: Adapter | None = None
    format: str = FORMAT

    @property
    def origin(self) -> Position:
        """Version 0."""
        return Position(0, self.digest)

    @property
    def stem(self) -> str:
        """First part of the names of an anchor's weight files."""
        return "model" if self.adapter is None else "adapter_model"

    def dumps(self) -> bytes:
        doc = {
            "format": self.format,
            "run_id": self.run_id,
            "digest": self.digest,
            "base": asdict(self.base),
            "created": self.created,
            "public_key": self.public_key,
            **({} if self.adapter is None else {"view": "adapter", "adapter": asdict(self.adapter)}),
            "table_hash": self.table.hash,
            "table": self.table.to_json(),
        }
        return seal(doc, MAX_TABLE_BYTES)

    @classmethod
    def loads(cls, data: bytes) -> Run:
        what = "run.json"
        doc = unseal(data, what, MAX_TABLE_BYTES)
        of = Fields(doc, what)
        table = TensorTable.from_json(doc.get("table"))
        if doc.get("table_hash") != table.hash:
            raise FormatError(f"{what}: the tensor table does not match its table_hash")
        return cls(
            run_id=of.match("run_id", _RUN_ID),
            table=table,
            digest=of.match("digest", _HEX128),
            base=_base(doc.get("base"), what),
            created=of.seconds("created"),
            public_key=of.match("public_key", _HEX256) if of.has("public_key") else None,
            adapter=Adapter.from_json(doc["adapter"]) if of.has("adapter") else None,
        )


@dataclass(frozen=True)
class Head:
    """`head.json`: a hint to the newest manifest, embedded, and the version that replicas should serve.

    Attributes:
        manifest: the newest delta or anchor.
        serve: version that replicas should serve.
        written: seconds since 1970, the writer's clock.
    """

    manifest: Manifest
    serve: int
    written: float = field(default=0.0, compare=False)
    format: str = FORMAT

    def dumps(self) -> bytes:
        doc = {"format": self.format, "serve": self.serve, "written": self.written}
        return seal({**doc, "manifest": self.manifest.to_json()})

    @classmethod
    def loads(cls, data: bytes) -> Head:
        what = "head.json"
        doc = unseal(data, what)
        of = Fields(doc, what)
        manifest = Manifest.from_json(doc.get("manifest"))
        if manifest.kind == "merged":
            raise FormatError(f"{what}: a merged delta is never the newest version")
        return cls(manifest, of.integer("serve", 0, MAX_VERSION), of.seconds("written"))


def _known_fields(cls: type, doc: Mapping[str, Any], what: str) -> dict[str, Any]:
    known = {f.name for f in fields(cls)}
    optional = ("step", "name", "encoding", "serve", "expires", "absolute", "times", "format")
    missing = [f.name for f in fields(cls) if f.name not in doc and f.name not in optional]
    if missing:
        raise FormatError(f"{what}: missing {', '.join(missing)}")
    return {"encoding": Encoding.FAST, **{key: value for key, value in doc.items() if key in known}}


def _check_order(kind: str, position: Position, parent: Position | None, parent_epoch: str | None) -> None:
    what = "manifest"
    if (kind == "anchor") == (parent is not None):
        raise FormatError(f"{what}: a delta has a parent, an anchor has none")
    if parent is not None and parent.version >= position.version:
        raise FormatError(f"{what}: version {position.version} does not follow its parent {parent.version}")
    if kind == "anchor" and parent_epoch is not None:
        raise FormatError(f"{what}: an anchor has no parent epoch")
    if parent is not None and (parent.version == 0) != (parent_epoch is None):
        raise FormatError(f"{what}: parent_epoch must be given unless the parent is version 0")


def _position(doc: object, what: str) -> Position:
    if not isinstance(doc, dict):
        raise FormatError(f"{what}: a position must be an object")
    of = Fields(doc, what)
    return Position(of.integer("version", 0, MAX_VERSION), of.match("digest", _HEX128))


def _base(doc: object, what: str) -> Base:
    base = doc or {}
    if not isinstance(base, dict):
        raise FormatError(f"{what}: base must be an object")
    of = Fields(base, what)
    return Base(
        model=of.text("model", 4096) if of.has("model") else None,
        revision=of.text("revision", 256) if of.has("revision") else None,
    )


def _parts(doc: object, kind: str, what: str) -> tuple[Part, ...]:
    if not isinstance(doc, list) or len(doc) > MAX_PARTS:
        raise FormatError(f"{what}: parts must be a list of at most {MAX_PARTS}")
    parts = tuple(_part(row, kind, what) for row in doc)
    keys = [part.file if kind == "anchor" else part.rank for part in parts]
    if len(set(keys)) != len(keys):
        raise FormatError(f"{what}: two parts have the same file name or rank")
    return parts


def _part(doc: object, kind: str, what: str) -> Part:
    if not isinstance(doc, dict):
        raise FormatError(f"{what}: a part must be an object")
    file = doc.get("file")
    if (kind == "anchor") != (file is not None):
        raise FormatError(f"{what}: the parts of an anchor have file names, those of a delta have none")
    if file is not None and not (isinstance(file, str) and (file in SIDE_FILES or _SHARD.fullmatch(file))):
        raise FormatError(f"{what}: {file!r} is not a file that an anchor may hold")
    of = Fields(doc, what)
    return Part(
        size=of.integer("size", 0, MAX_PART_BYTES),
        sha256=of.match("sha256", _HEX256),
        rank=of.integer("rank", 0, MAX_PARTS),
        file=file,
    )
