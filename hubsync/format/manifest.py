"""The three JSON documents of a run: `Run`, `Manifest`, `Head`. Parsing them is a trust boundary.

* `run.json` fixes what never changes: run id, tensor table, base model, digest of version 0.
* a manifest is the immutable commit record of one delta, anchor or merged delta, which exists when its manifest does.
* `head.json` is the one mutable file, and only a hint: readers keep a high-water mark.

Each is stored with a checksum of itself, because nothing below checks what is downloaded, and a flipped digit in a
digest would look like another branch of the run. Every field is checked for type and range before use. No path is ever
read from a document: object names are derived from (epoch, version, rank, hash) by `hubsync.chain.Layout`. Unknown
*fields* are ignored, so that fields can be added; an unknown `format` is refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from hubsync.errors import FormatError, UnknownFormat

from .encoding import Encoding
from .table import TensorTable

FORMAT = "hubsync/1"

SIGNATURE = "signature"  # field of a stored document; not part of its content

KINDS = ("delta", "anchor", "merged")
MAX_VERSION = 10**8 - 1  # object names hold eight digits
MAX_PARTS = 1 << 16
LAST_YEAR = 253e9  # seconds since 1970, late in the year 9987: calendars end with 9999
MAX_PART_BYTES = 1 << 40

# What an anchor may hold beside its weights, so that `from_pretrained` and `vllm serve` load it.
SIDE_FILES = frozenset(
    {
        "config.json",
        "adapter_config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
        "chat_template.json",
        "preprocessor_config.json",
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
    """Where somebody stands in a chain: a version and the digest (32 hex digits) of the view at that version."""

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

    A delta leads from `parent` to `position`, and so does a merged delta, over the versions between. An anchor *is*
    the view at `position` and has no parent of its own; where a delta and an anchor of one version exist, both have
    the same digest.

    Attributes:
        kind: "delta", "merged" or "anchor".
        run_id: run this belongs to.
        table_hash: hash of the run's tensor table.
        epoch: writer epoch that wrote it, `00000003-1a2b3c4d`; of a merged delta its compactor, `compact-5e6f7a8b`.
        position: version and digest this leads to.
        parent: version and digest a delta applies to; None for an anchor.
        parent_epoch: epoch that holds the parent version's manifest; None if the parent is version 0, or for an anchor.
        parts: immutable objects, in rank order.
        changed: elements that differ between parent and position (0 for an anchor).
        created: seconds since 1970, the publisher's clock; information only.
        step: the trainer's step, if it told.
        name: free text of the user, shown by `hubsync ls`.
        encoding: of the parts.
        serve: version that replicas were to serve when this was committed; None if that is this one. The head may say
            otherwise later; this is for who finds no head that is in order.
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
    format: str = FORMAT

    @property
    def version(self) -> int:
        return self.position.version

    @property
    def served(self) -> int:
        """The version that replicas were to serve when this was committed."""
        return self.version if self.serve is None else self.serve

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.size for part in self.parts)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def dumps(self) -> bytes:
        return seal(self.to_json())

    @classmethod
    def from_json(cls, doc: object) -> Manifest:
        what = "manifest"
        doc = _known_fields(cls, _versioned(doc, what), what)
        kind = _choice(doc, "kind", KINDS, what)
        position = _position(doc.get("position"), what)
        parent = None if doc.get("parent") is None else _position(doc["parent"], what)
        parent_epoch = None if doc.get("parent_epoch") is None else _match(doc, "parent_epoch", _EPOCH, what)
        if (kind == "anchor") == (parent is not None):
            raise FormatError(f"{what}: a delta has a parent, an anchor has none")
        if parent is not None and parent.version >= position.version:
            raise FormatError(f"{what}: version {position.version} does not follow its parent {parent.version}")
        if kind == "anchor" and parent_epoch is not None:
            raise FormatError(f"{what}: an anchor has no parent epoch")
        if parent is not None and (parent.version == 0) != (parent_epoch is None):
            raise FormatError(f"{what}: parent_epoch must be given unless the parent is version 0")
        return cls(
            kind=kind,
            run_id=_match(doc, "run_id", _RUN_ID, what),
            table_hash=_match(doc, "table_hash", _HEX256, what),
            epoch=_match(doc, "epoch", _COMPACTOR if kind == "merged" else _EPOCH, what),
            position=position,
            parent=parent,
            parent_epoch=parent_epoch,
            parts=_parts(doc.get("parts"), kind, what),
            changed=_integer(doc, "changed", 0, 1 << 62, what),
            created=_number(doc, "created", what),
            step=None if doc.get("step") is None else _integer(doc, "step", 0, 1 << 62, what),
            name=None if doc.get("name") is None else _text(doc, "name", 512, what),
            encoding=Encoding(_choice(doc, "encoding", tuple(Encoding), what)),
            serve=None if doc.get("serve") is None else _integer(doc, "serve", 0, position.version, what),
            expires=None if doc.get("expires") is None else _number(doc, "expires", what),
        )

    @classmethod
    def loads(cls, data: bytes) -> Manifest:
        return cls.from_json(unseal(data, "manifest"))


@dataclass(frozen=True)
class Base:
    """Where version 0 comes from. It is referenced, never uploaded, unless it exists nowhere else.

    Attributes:
        model: Hub repository or local path the trainer loaded, as the user would pass it to `vllm serve`; None if the
            model was made in memory: then an anchor of version 0 is in the bucket.
        revision: commit of the repository, if known.
    """

    model: str | None = None
    revision: str | None = None


# What an adapter's config may say: PEFT's names. Everything else that a document holds is dropped.
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
    """What a run is that publishes a LoRA adapter: its view is the adapter's tensors, and none of the model's.

    Attributes:
        config: what PEFT's `adapter_config.json` says, as far as it is one of `ADAPTER_FIELDS`: rank (`r`),
            `lora_alpha`, ... The same for all versions.
        base: the model that it adapts.
        base_digest: digest (32 hex digits) of that model's tensors, cast to the view's dtype; None where it was not
            computed (quantised or sharded).
    """

    config: Mapping[str, Any]
    base: Base
    base_digest: str | None = None

    @classmethod
    def from_json(cls, doc: object) -> Adapter:
        what = "run.json: adapter"
        if not isinstance(doc, dict) or not isinstance(doc.get("config"), dict):
            raise FormatError(f"{what}: expected an object with a config")
        config = {key: value for key, value in doc["config"].items() if key in ADAPTER_FIELDS}
        if len(canonical(config)) > _MAX_CONFIG_BYTES:
            raise FormatError(f"{what}: its config is larger than {_MAX_CONFIG_BYTES} bytes")
        _integer(config, "r", 1, 1 << 16, what)
        digest = None if doc.get("base_digest") is None else _match(doc, "base_digest", _HEX128, what)
        return cls(config, _base(doc.get("base"), what), digest)


@dataclass(frozen=True)
class Run:
    """`run.json`: what every publisher and replica of one run agrees on. Written once."""

    run_id: str
    table: TensorTable
    digest: str  # of version 0
    base: Base = field(default_factory=Base)
    created: float = 0.0
    public_key: str | None = None  # whose signature all documents of the run have, if they are signed
    adapter: Adapter | None = None  # where the published view is an adapter; else it is the whole model
    format: str = FORMAT

    @property
    def origin(self) -> Position:
        """Version 0."""
        return Position(0, self.digest)

    @property
    def stem(self) -> str:
        """How the weight files of an anchor are called, without the rest of their names."""
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
        return seal(doc)

    @classmethod
    def loads(cls, data: bytes) -> Run:
        what = "run.json"
        doc = unseal(data, what)
        table = TensorTable.from_json(doc.get("table"))
        if doc.get("table_hash") != table.hash:
            raise FormatError(f"{what}: the tensor table does not have the hash that it states")
        return cls(
            run_id=_match(doc, "run_id", _RUN_ID, what),
            table=table,
            digest=_match(doc, "digest", _HEX128, what),
            base=_base(doc.get("base"), what),
            created=_number(doc, "created", what),
            public_key=None if doc.get("public_key") is None else _match(doc, "public_key", _HEX256, what),
            adapter=None if doc.get("adapter") is None else Adapter.from_json(doc["adapter"]),
        )


@dataclass(frozen=True)
class Head:
    """`head.json`: a hint to the newest manifest, embedded, and the version replicas should serve."""

    manifest: Manifest
    serve: int
    written: float = field(default=0.0, compare=False)  # seconds since 1970, the writer's clock
    format: str = FORMAT

    def dumps(self) -> bytes:
        doc = {"format": self.format, "serve": self.serve, "written": self.written}
        return seal({**doc, "manifest": self.manifest.to_json()})

    @classmethod
    def loads(cls, data: bytes) -> Head:
        what = "head.json"
        doc = unseal(data, what)
        manifest = Manifest.from_json(doc.get("manifest"))
        if manifest.kind == "merged":
            raise FormatError(f"{what}: a merged delta is never the newest version")
        return cls(manifest, _integer(doc, "serve", 0, MAX_VERSION, what), _number(doc, "written", what))


# --- checks -----------------------------------------------------------------------------------------


def seal(doc: Mapping[str, Any]) -> bytes:
    """A document as it is stored: JSON, with a checksum over everything else in it."""
    return json.dumps({**doc, "checksum": _checksum(doc)}, indent=1).encode()


def unseal(data: bytes, what: str) -> dict[str, Any]:
    """Parse what `seal` wrote; FormatError if it is something else, of an unknown format, or damaged."""
    try:
        doc = _versioned(json.loads(data), what)
        doc.pop(SIGNATURE, None)  # `hubsync.bucket.signed` looks at it, for who has the key
        stated = doc.pop("checksum", None)
        found = _checksum(doc)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{what}: not valid JSON ({error})") from None
    if stated != found:
        raise FormatError(f"{what}: damaged, its content does not have the checksum that it states")
    return doc


def _checksum(doc: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical(doc)).hexdigest()


def canonical(doc: Mapping[str, Any]) -> bytes:
    """The one form of a document that is hashed and signed."""
    return json.dumps(doc, sort_keys=True, separators=(",", ":")).encode()


def _versioned(doc: object, what: str) -> dict[str, Any]:
    if not isinstance(doc, dict):
        raise FormatError(f"{what}: expected a JSON object")
    if doc.get("format") != FORMAT:
        raise UnknownFormat(
            f"{what}: format {doc.get('format')!r} is not {FORMAT!r}; upgrade hubsync on the side that reads"
        )
    return doc


def _known_fields(cls: type, doc: Mapping[str, Any], what: str) -> dict[str, Any]:
    known = {f.name for f in fields(cls)}
    optional = ("step", "name", "encoding", "serve", "expires", "format")
    missing = [f.name for f in fields(cls) if f.name not in doc and f.name not in optional]
    if missing:
        raise FormatError(f"{what}: missing {', '.join(missing)}")
    return {"encoding": Encoding.FAST, **{key: value for key, value in doc.items() if key in known}}


def _position(doc: object, what: str) -> Position:
    if not isinstance(doc, dict):
        raise FormatError(f"{what}: a position must be an object")
    return Position(_integer(doc, "version", 0, MAX_VERSION, what), _match(doc, "digest", _HEX128, what))


def _base(doc: object, what: str) -> Base:
    base = doc or {}
    if not isinstance(base, dict):
        raise FormatError(f"{what}: base must be an object")
    return Base(
        model=None if base.get("model") is None else _text(base, "model", 4096, what),
        revision=None if base.get("revision") is None else _text(base, "revision", 256, what),
    )


def _parts(doc: object, kind: str, what: str) -> tuple[Part, ...]:
    if not isinstance(doc, list) or len(doc) > MAX_PARTS:
        raise FormatError(f"{what}: parts must be a list of at most {MAX_PARTS}")
    parts = []
    for row in doc:
        if not isinstance(row, dict):
            raise FormatError(f"{what}: a part must be an object")
        file = row.get("file")
        if (kind == "anchor") != (file is not None):
            raise FormatError(f"{what}: the parts of an anchor have file names, those of a delta have none")
        if file is not None and not (isinstance(file, str) and (file in SIDE_FILES or _SHARD.fullmatch(file))):
            raise FormatError(f"{what}: {file!r} is not a file that an anchor may hold")
        parts.append(
            Part(
                size=_integer(row, "size", 0, MAX_PART_BYTES, what),
                sha256=_match(row, "sha256", _HEX256, what),
                rank=_integer(row, "rank", 0, MAX_PARTS, what),
                file=file,
            )
        )
    keys = [part.file if kind == "anchor" else part.rank for part in parts]
    if len(set(keys)) != len(keys):
        raise FormatError(f"{what}: two parts have the same place")
    return tuple(parts)


def _integer(doc: Mapping[str, Any], key: str, low: int, high: int, what: str) -> int:
    value = doc.get(key)
    if type(value) is not int or not low <= value <= high:
        raise FormatError(f"{what}: {key} must be an integer from {low} to {high}, not {value!r:.80}")
    return value


def _number(doc: Mapping[str, Any], key: str, what: str) -> float:
    value = doc.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < LAST_YEAR:
        raise FormatError(f"{what}: {key} must be seconds since 1970, not {value!r:.80}")
    return float(value)


def _text(doc: Mapping[str, Any], key: str, longest: int, what: str) -> str:
    value = doc.get(key)
    if not isinstance(value, str) or len(value) > longest or not value.isprintable():
        raise FormatError(f"{what}: {key} must be printable text of at most {longest} characters")
    return value


def _match(doc: Mapping[str, Any], key: str, pattern: re.Pattern[str], what: str) -> str:
    value = doc.get(key)
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise FormatError(f"{what}: {key} is malformed: {value!r:.80}")
    return value


def _choice(doc: Mapping[str, Any], key: str, choices: tuple[str, ...], what: str) -> str:
    value = doc.get(key)
    if value not in choices:
        raise FormatError(f"{what}: {key} must be one of {', '.join(choices)}, not {value!r:.80}")
    return str(value)
