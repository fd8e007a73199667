"""The model in training, as a run describes it: its base checkpoint, its adapter, and the other files of an anchor."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from hubsync.errors import ConfigError
from hubsync.format.checkpoint import Checkpoint, Specs, header
from hubsync.format.digest import Digest, digest_view
from hubsync.format.manifest import SIDE_FILES, Adapter, Base
from hubsync.format.parts import write_adapter_config
from hubsync.format.table import TensorTable
from hubsync.publish.detect.stepping import unwrapped
from hubsync.publish.view.adapters import adapter_config, base_digest, is_adapted
from hubsync.publish.view.deepspeed import is_deepspeeds, steps_masters
from hubsync.publish.view.stated import Stated, differences, stated_by

from .base_copy import local_copy
from .config import SyncConfig

logger = logging.getLogger(__name__)

_NAMES_SHOWN = 8


class TrainedModel:
    """A model without its wrappers, with everything that a run records about it besides its weights.

    Args:
        module: the model, from `without_wrapper`.
        config: names the base checkpoint and the served dtype.
        processing_class: tokenizer or processor to store with the weights of anchors, or None.

    Attributes:
        adapter: the adapter of a PEFT model; None for any other model, which publishes all of its weights.
    """

    def __init__(self, module: torch.nn.Module, config: SyncConfig, processing_class: Any = None):
        self._module = module
        self._processing_class = processing_class
        self._view_dtype = config.view_dtype
        self._has_warned = False
        self._base = _stated_base(module, config)
        self.adapter: Adapter | None = None
        if is_adapted(module):
            self.adapter = Adapter(adapter_config(module), self._base, base_digest(module, config.dtype))

    def stated(self, tensors: Mapping[str, torch.Tensor]) -> Stated:
        """What the view of the model takes over from the base checkpoint, if that is on this machine."""
        return Stated() if self.adapter is not None else stated_by(self._base_specs(), self._module, tensors)

    def _base_specs(self) -> Specs:
        directory = None if self._base.model is None or self.adapter is not None else local_copy(self._base)
        return {} if directory is None else header(directory)

    def base_for(self, table: TensorTable, digest: Digest) -> Base:
        """The checkpoint that inference servers load as version 0: the one of the settings, else of the model's config.

        An empty `Base` if that checkpoint does not hold the model's weights: the model may have been trained since, or
        loaded from elsewhere. Also for an adapter, whose version 0 is uploaded.
        """
        if self.adapter is not None:
            return Base()
        directory = None if self._base.model is None else local_copy(self._base)
        if directory is None:
            return self._base
        differing = differences(header(directory), {spec.name: spec.shape for spec in table})
        if differing is not None:
            logger.warning(
                "the model has other tensors than %s (%s): uploading it whole as version 0. A server that was started "
                "from %s refuses the run: start servers from that upload, and check once with `hubsync pull` and "
                "`hubsync doctor` that vLLM loads it",
                self._base.model,
                differing,
                self._base.model,
            )
            return Base()
        if digest_view(table, Checkpoint(directory, table)) == digest:
            return self._base
        logger.warning("the model does not hold the weights of %s: uploading it whole as version 0", self._base.model)
        return Base()

    def warn_of_left_out(self, table: TensorTable) -> None:
        """Warn once if the base checkpoint has weights that the model in training, and so an anchor, does not have."""
        directory = None if self._base.model is None or self.adapter is not None else local_copy(self._base)
        if directory is None or self._has_warned:
            return
        self._has_warned = True
        known = {name for name, _ in self._module.named_parameters(remove_duplicate=False)}  # also the tied ones
        names = [name for name in _weights_left_out(directory, table) if name not in known]
        if names:
            logger.warning(
                "the model in training does not have %d tensors of %s (%s), so uploads of the whole model do not "
                "either: start servers that need them (multi-token prediction) from the base model, or from what "
                "`hubsync pull --base DIR` writes",
                len(names),
                self._base.model,
                ", ".join(names[:_NAMES_SHOWN]) + (", ..." if len(names) > _NAMES_SHOWN else ""),
            )

    def write_side_files(self, directory: Path) -> None:
        """Write the files that an anchor holds with its weights: configs and tokenizer."""
        if self.adapter is not None:
            write_adapter_config(directory, self.adapter)
            owners = [self._processing_class]
        else:
            model: Any = self._module
            owners = [getattr(model, "config", None), getattr(model, "generation_config", None), self._processing_class]
        for owner in owners:
            if hasattr(owner, "save_pretrained"):
                owner.save_pretrained(directory)
        if self.adapter is None:
            if not (directory / "config.json").exists():  # a model of another library
                self._copy_side_files(directory)
            self._describe_view(directory / "config.json")

    def _copy_side_files(self, directory: Path) -> None:
        """Copy the configs and tokenizer of the base checkpoint, if that is on this machine."""
        base = None if self._base.model is None else local_copy(self._base)
        if base is None:
            return
        for name in SIDE_FILES:
            if (base / name).exists() and not (directory / name).exists() and not name.endswith(".index.json"):
                shutil.copyfile(base / name, directory / name)

    def _describe_view(self, path: Path) -> None:
        """Change a config that describes the training model to describe the view: its dtype and the class to load."""
        if not path.exists():
            return
        config = json.loads(path.read_text())
        parts = [config, *(part for part in config.values() if isinstance(part, dict))]
        for part in parts:
            part.update({key: self._view_dtype for key in ("dtype", "torch_dtype") if key in part})
        config["dtype"] = self._view_dtype
        config["architectures"] = config.get("architectures") or [_class_of(self._module).__name__]
        path.write_text(json.dumps(config, indent=2) + "\n")


def _weights_left_out(directory: Path, table: TensorTable) -> list[str]:
    """Weights of a checkpoint that are not in the table. Integers and rotary frequencies are computed by loaders."""
    try:
        left_out = Checkpoint(directory, table).left_out()
    except ConfigError:  # a damaged file, which matters only to who loads it
        return []
    names = []
    for name, path in left_out.items():
        with safe_open(path, framework="pt") as file:
            dtype = file.get_slice(name).get_dtype()
        if dtype.startswith(("F", "BF")) and not name.endswith("inv_freq"):
            names.append(name)
    return names


def without_wrapper(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside DDP, DeepSpeed's engine and torch.compile. It has the config and the class that describe it."""
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        return without_wrapper(model.module)
    if is_deepspeeds(model):
        return without_wrapper(model.get_submodule("module"))
    compiled = getattr(model, "_orig_mod", None)
    return model if compiled is None else without_wrapper(compiled)


def torch_optimizer(optimizer: Any) -> Any:
    """The torch optimizer inside accelerate's wrapper, which takes no hooks. ConfigError if there is none."""
    if optimizer is None:
        return None
    optimizer = unwrapped(optimizer)
    if not hasattr(optimizer, "register_step_post_hook"):
        raise ConfigError(f"{type(optimizer).__name__} is not a torch optimizer: pass that, or None")
    return optimizer


def warn_of_lost_updates(tensors: dict[str, torch.Tensor], view_dtype: torch.dtype) -> None:
    """Warn if trained parameters are narrower than float32."""
    narrow = {tensor.dtype for tensor in tensors.values() if tensor.requires_grad and tensor.element_size() < 4}
    if narrow:
        logger.warning(
            "the trained parameters are %s: updates smaller than half a unit in the last place are lost. Train with "
            "float32 parameters (and autocast); hubsync casts them to %s for inference",
            " and ".join(sorted(map(str, narrow))),
            view_dtype,
        )


def warn_of_unpublished(model: torch.nn.Module, optimizer: Any) -> None:
    """Warn if the optimizer trains parameters outside of the model: on purpose, or because it is the wrong model."""
    if optimizer is None or steps_masters(optimizer):
        return
    given = {id(parameter) for parameter in model.parameters()}
    groups = unwrapped(optimizer).param_groups
    outside = [tensor for group in groups for tensor in group["params"] if id(tensor) not in given]
    if outside:
        logger.warning(
            "the optimizer trains %d tensors (%d elements) that are not in the model given to hubsync: they are not "
            "published. This is right for a value head, or for float32 masters that are copied into the model. "
            "Otherwise give hubsync the model that is trained",
            len(outside),
            sum(tensor.numel() for tensor in outside),
        )


def _stated_base(model: torch.nn.Module, config: SyncConfig) -> Base:
    if config.base_model is not None:
        return Base(config.base_model, config.base_revision)
    source: Any = getattr(model, "config", None)
    name = getattr(source, "_name_or_path", None) or None
    if name is None:
        return Base()
    if Path(name).is_dir():
        return Base(str(Path(name).resolve()))
    commit = getattr(source, "_commit_hash", None)
    return Base(name, commit) if commit is not None else Base()


def _class_of(model: torch.nn.Module) -> type:
    """The class that loads the model: `fully_shard` replaces a model's class by a subclass."""
    from torch.distributed.fsdp import FSDPModule  # takes a second

    return next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
