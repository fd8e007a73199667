"""Object names of a run. They are made here from validated numbers, never read from a document.

```
run.json
head.json
gc.json                                                              since when objects are unneeded
claims/5e6f7a8b.json                                                 while a trainer creates the run
replicas/0123456789abcdef.json                                       status of a server, for `hubsync watch` only
epochs/00000003-1a2b3c4d/epoch.json                                  marker of a writer
epochs/00000003-1a2b3c4d/versions/00000042.json                      manifest of a delta
epochs/00000003-1a2b3c4d/deltas/00000042-00000-<sha256[:16]>.safetensors
epochs/00000003-1a2b3c4d/anchors/00000040/manifest.json              manifest of an anchor
epochs/00000003-1a2b3c4d/anchors/00000040/<its files>
epochs/compact-5e6f7a8b/merged/00000032-00000040/manifest.json       manifest of a merged delta
epochs/compact-5e6f7a8b/merged/00000032-00000040/00000-<sha256[:16]>.safetensors
```
Numbers have a fixed width, so the order of names is the order of epochs and versions. A compactor's directory has no
number: it begins no epoch, so it fences no writer, and readers that do not know merged deltas ignore it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from hubsync.format.manifest import Manifest, Part

MAX_EPOCH = 10**8 - 1  # object names hold eight digits

_NAME = re.compile(r"epochs/(\d{8}-[0-9a-f]{8})(?:/(?:versions/(\d{8})\.json|anchors/(\d{8})/manifest\.json)|/.*)?")
_REPLICA = re.compile(r"replicas/[0-9a-f]{16}\.json")
_MERGED = re.compile(r"epochs/compact-[0-9a-f]{8}/merged/(\d{8})-(\d{8})/manifest\.json")


class Layout:
    """Names of the objects of a run, relative to its prefix."""

    RUN = "run.json"
    HEAD = "head.json"
    EPOCHS = "epochs"
    GARBAGE = "gc.json"
    CLAIMS = "claims"
    REPLICAS = "replicas"

    @staticmethod
    def claim(name: str) -> str:
        """What a process writes before it creates a run. See `creation`."""
        return f"claims/{name}.json"

    @staticmethod
    def replica(name: str) -> str:
        """What a follower says of its server. `name`: 16 hex digits."""
        return f"replicas/{name}.json"

    @staticmethod
    def is_replica(path: str) -> bool:
        """Whether a name is that of such an object."""
        return _REPLICA.fullmatch(path) is not None

    @staticmethod
    def epoch(epoch: str) -> str:
        """Marker of an epoch. It fences the writers of older epochs."""
        return f"epochs/{epoch}/epoch.json"

    @staticmethod
    def delta(epoch: str, version: int) -> str:
        """Path of the manifest of the delta that ends at `version`."""
        return f"epochs/{epoch}/versions/{version:08d}.json"

    @staticmethod
    def anchor(epoch: str, version: int) -> str:
        """Manifest of the anchor of `version`, in the directory of its files."""
        return f"epochs/{epoch}/anchors/{version:08d}/manifest.json"

    @staticmethod
    def merged(epoch: str, first: int, last: int) -> str:
        """Manifest of the merged delta from version `first` to version `last`, in the directory of its parts."""
        return f"epochs/{epoch}/merged/{first:08d}-{last:08d}/manifest.json"

    @staticmethod
    def manifest(manifest: Manifest) -> str:
        """Name of a manifest's own object."""
        if manifest.kind == "merged":
            assert manifest.parent is not None  # the parser guarantees it
            return Layout.merged(manifest.epoch, manifest.parent.version, manifest.version)
        make = Layout.delta if manifest.kind == "delta" else Layout.anchor
        return make(manifest.epoch, manifest.version)

    @staticmethod
    def part(manifest: Manifest, part: Part) -> str:
        """Name of one part of a manifest."""
        if manifest.kind == "anchor":
            return f"epochs/{manifest.epoch}/anchors/{manifest.version:08d}/{part.file}"
        if manifest.kind == "merged":
            directory = Layout.manifest(manifest).rpartition("/")[0]
            return f"{directory}/{part.rank:05d}-{part.sha256[:16]}.safetensors"
        name = f"{manifest.version:08d}-{part.rank:05d}-{part.sha256[:16]}.safetensors"
        return f"epochs/{manifest.epoch}/deltas/{name}"


@dataclass
class EpochNames:
    """Versions with a manifest in one epoch, from the names of its objects alone."""

    deltas: set[int] = field(default_factory=set)
    anchors: set[int] = field(default_factory=set)

    @property
    def versions(self) -> set[int]:
        return self.deltas | self.anchors


def epoch_names(paths: Iterable[str]) -> dict[str, EpochNames]:
    """Epoch -> its manifests, oldest epoch first. Other names are ignored."""
    epochs: dict[str, EpochNames] = {}
    for path in paths:
        match = _NAME.fullmatch(path)
        if match is None:
            continue
        epoch, delta, anchor = match.groups()
        names = epochs.setdefault(epoch, EpochNames())
        if delta is not None:
            names.deltas.add(int(delta))
        if anchor is not None:
            names.anchors.add(int(anchor))
    return dict(sorted(epochs.items()))


def merged_names(paths: Iterable[str]) -> dict[int, list[tuple[int, str]]]:
    """Version -> merged deltas that lead to it: the version that each starts from, and the name of its manifest."""
    found: dict[int, list[tuple[int, str]]] = {}
    for path in sorted(paths):
        match = _MERGED.fullmatch(path)
        if match is not None:
            found.setdefault(int(match[2]), []).append((int(match[1]), path))
    return {last: sorted(spans) for last, spans in found.items()}
