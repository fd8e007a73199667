"""The published view of a model: the tensors that a checkpoint of it would hold.

These are its parameters and persistent floating point buffers. Each is published once, under its checkpoint name and in
the parts that a checkpoint has of it, cast to the dtype that is served.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from hubsync.errors import ConfigError
from hubsync.format.table import TensorSpec, TensorTable
from hubsync.kernels.bits import dtype_code

from .adapters import FrozenBase, adapter_tensors, is_adapted
from .conversion import Places, places_in, published, transposed_as
from .deepspeed import Partition, is_partitioned
from .naming import names_within
from .pieces import in_pieces

_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")  # torch.compile, activation checkpointing
_ANOTHER_MODEL = "a run publishes one model: make a new engine with another prefix for this one"


class PublishedView(Protocol):
    """What is published: found in a model (`LiveView`), or given by its trainer (`cuts.CutView`)."""

    def described(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]] | None:
        """What this rank has, if other ranks may have other tensors; else None."""

    def complete(self, described: Sequence[Any]) -> None:
        """Learn what each rank's `described` has returned."""

    def lay_out(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Publish in the layout of the base checkpoint, or the run, where that is possible. Whether it changes."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """Published name -> live tensor."""

    def require_frozen(self) -> None:
        """ConfigError if weights have changed that must not."""


class LiveView:
    """The published tensors of a model, and their positions in its parameters and buffers.

    Args:
        model: the model, from `without_wrapper`.
        dtype: dtype that is served.

    Raises:
        ConfigError: the model has no weights, or its checkpoint holds tensors that are no parts of its tensors.
    """

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype = torch.bfloat16):
        self._model = model
        found = live_tensors(model)
        if not found:
            raise ConfigError(f"{type(model).__name__} has no parameters to publish")
        self._frozen = FrozenBase(model, dtype) if is_adapted(model) else None
        self._places: Places = {}
        saving = None if is_adapted(model) else _saving_model(model)
        if saving is not None:
            prefix, inner = saving
            self._places = places_in(inner, found, prefix)
        # A part of a tensor keeps its own shape, whatever the tensor has become.
        self._shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}

    def described(self) -> None:
        """None: all ranks hold parts of the same tensors."""

    def complete(self, described: Sequence[Any]) -> None:
        """ConfigError if another rank has a layout."""
        if any(own is not None for own in described):
            raise ConfigError("some ranks have a layout, and others have none: give all ranks one")

    def lay_out(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Publish tensors under the names of the base checkpoint, or the run, and transposed where that has them so.

        A language model that was taken from a multimodal one has other names (`naming`). transformers loads the experts
        of some checkpoints transposed and saves them so (Qwen3-VL-MoE). Servers load the checkpoint.

        Args:
            shapes: published name -> shape there. Other names are ignored, and so are shapes that are no exchange.

        Returns:
            whether that changes the view.
        """
        names = names_within({name: tuple(tensor.shape) for name, tensor in self.tensors().items()}, shapes)
        changes = False
        for name, tensor in live_tensors(self._model).items():
            parts = self._places.get(name, {name: None})
            found = {
                names.get(part, part): transposed_as(tensor, place, shapes.get(names.get(part, part)))
                for part, place in parts.items()
            }
            if found != parts:
                self._places[name], changes = found, True
        return changes

    def tensors(self) -> dict[str, torch.Tensor]:
        """Published name -> live parameter or buffer, or a part of one, as the model holds them now.

        ConfigError if a tensor that is published in parts has another shape than at first: its parts lie elsewhere.
        """
        found = live_tensors(self._model)
        for name, parts in self._places.items():
            if name in found and None not in parts.values() and tuple(found[name].shape) != self._shapes[name]:
                raise ConfigError(_other_shape(name, tuple(found[name].shape), self._shapes[name]))
        return published(found, self._places)

    def require_frozen(self) -> None:
        """ConfigError if the view is an adapter, and a weight under it has changed since this was made."""
        if self._frozen is not None:
            self._frozen.require_unchanged()


def published_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """`LiveView.tensors`, once."""
    return LiveView(model).tensors()


def live_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Name without wrappers -> live parameter or buffer, in the model's order; tied weights under their first name.

    For a PEFT model these are the tensors of its adapter, under their names in an adapter checkpoint. Integer tensors
    are not weights and are left out. ConfigError for a tensor that is sharded in an unsupported way, or that cannot be
    published.
    """
    found: dict[str, torch.Tensor] = {}
    for name, tensor in (adapter_tensors(model) if is_adapted(model) else model_tensors(model)).items():
        _require_loaded(name, tensor)
        tensor = Partition(name, tensor) if is_partitioned(tensor) else in_pieces(name, tensor)
        if tensor.is_complex():
            raise ConfigError(f"{name} is complex: only real weights can be published")
        if not tensor.is_floating_point():
            continue
        checkpoint_name = _checkpoint_name(name)
        if checkpoint_name in found:
            raise ConfigError(f"two tensors of the model have the checkpoint name {checkpoint_name}")
        found[checkpoint_name] = tensor
    return found


def model_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers of a model by name."""
    persistent = model.state_dict(keep_vars=True).keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    return {**dict(model.named_parameters()), **buffers}


def table_of(
    tensors: Mapping[str, torch.Tensor], dtype: torch.dtype, kept: Mapping[str, str] | None = None
) -> TensorTable:
    """The tensor table of a published view that is served in `dtype`. Trainer and doctor build it with this.

    Args:
        tensors: only their names and shapes matter.
        kept: name -> safetensors dtype code of the tensors that have another dtype; see `dtypes.kept_by`.
    """
    code, others = dtype_code(dtype), kept or {}
    return TensorTable(
        [TensorSpec(name, tuple(tensor.shape), others.get(name, code)) for name, tensor in tensors.items()]
    )


def require_same_table(table: TensorTable, tensors: dict[str, torch.Tensor]) -> None:
    """ConfigError unless live tensors have the names and shapes of the table."""
    for name in sorted(tensors.keys() ^ {spec.name for spec in table}):
        raise ConfigError(f"the model {'now has' if name in tensors else 'no longer has'} {name}; {_ANOTHER_MODEL}")
    for spec in table:
        if tuple(tensors[spec.name].shape) != spec.shape:
            raise ConfigError(_other_shape(spec.name, tuple(tensors[spec.name].shape), spec.shape))


def _other_shape(name: str, now: tuple[int, ...], before: tuple[int, ...]) -> str:
    return f"{name} now has shape {list(now)} instead of {list(before)}; {_ANOTHER_MODEL}"


def _checkpoint_name(name: str) -> str:
    segments = [segment for segment in name.split(".") if segment not in _WRAPPERS]
    while len(segments) > 1 and segments[0] == "module":  # DistributedDataParallel
        segments = segments[1:]
    return ".".join(segments)


def _saving_model(model: torch.nn.Module) -> tuple[str, torch.nn.Module] | None:
    """The transformers model inside the wrappers, and its name prefix. None for any other model: it has no renames."""
    inner, path = model, ""
    while not hasattr(inner, "save_pretrained"):
        children = list(inner.named_children())
        if len(children) != 1:
            return None
        ((name, inner),) = children
        path += f"{name}."
    return _checkpoint_name(f"{path}name").removesuffix("name"), getattr(inner, "_orig_mod", inner)


def _require_loaded(name: str, tensor: torch.Tensor) -> None:
    if "_fsdp_wrapped_module" in name or "_flat_param" in name:
        raise ConfigError(f"{name} is sharded by FSDP1, which is not supported: use FSDP2 (`fully_shard`)")
    if tensor.is_meta:
        raise ConfigError(f"{name} is on the meta device: load the weights before the engine is made")
