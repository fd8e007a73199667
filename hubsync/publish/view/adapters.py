"""Publishing the adapter of a PEFT model: its tensors, its config, and the adapters that vLLM cannot serve.

The base model is frozen and the servers have it, so a version is the adapter alone. It is never merged into the base:
merging changes nearly every weight in every step, and rounds, so that repeated merging and unmerging drifts.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import Any

import torch

from hubsync.errors import ConfigError, RunMismatch
from hubsync.format.digest import Digest, digest_torch, tensor_seed
from hubsync.format.manifest import ADAPTER_FIELDS, Adapter

from .cast import cast, integers
from .deepspeed import is_partitioned
from .shards import local_part

_MERGED = (
    "the adapter is merged into the base model, which changes nearly every weight in every step, and drifts by "
    "rounding. hubsync publishes the adapter itself: call unmerge_adapter() before, and keep the PEFT model"
)

# Settings with which an adapter is not just what vLLM adds to a layer.
_UNSERVABLE = {
    "use_dora": "DoRA scales the columns of the base",
    "lora_bias": "it adds biases",
    "modules_to_save": "these modules are trained completely",
    "trainable_token_indices": "it trains embeddings of tokens",
    "target_parameters": "it adapts parameters outside of layers",
    "alora_invocation_tokens": "it is only active after certain tokens",
    "layer_replication": "it repeats layers of the base",
    "use_qalora": "it pools the inputs of layers",
    "use_bdlora": "its matrices are block-diagonal",
}
# Initialisations that do not change the base model.
_INITIALISATIONS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")

# Settings that change the meaning of the same tensors.
_MEANING = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out")


def is_adapted(model: torch.nn.Module) -> bool:
    """Whether this is a PEFT model."""
    return hasattr(model, "peft_config")


def adapter_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Name in `adapter_model.safetensors` -> live parameter of the active adapter, in the model's order.

    ConfigError if vLLM cannot load the adapter, if it is merged into the base, or if other parameters are trained.
    """
    name, config = _active(model)
    _require_servable(config)
    from peft import get_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if not layers or any(layer.merged for layer in layers):
        raise ConfigError(_MERGED)
    found: dict[str, torch.Tensor] = get_peft_model_state_dict(
        model, model.state_dict(keep_vars=True), adapter_name=name, save_embedding_layers=False
    )
    _require_all_that_is_trained(model, found.values())
    return found


def adapter_config(model: torch.nn.Module) -> dict[str, Any]:
    """The fields of the adapter's `adapter_config.json` that matter for loading it."""
    _, config = _active(model)
    config_fields = {**config.to_dict(), "inference_mode": True}
    return {key: _plain(config_fields[key]) for key in ADAPTER_FIELDS if config_fields.get(key) is not None}


def base_digest(model: torch.nn.Module, dtype: torch.dtype) -> str | None:
    """Digest of the frozen base model's tensors, cast to `dtype`, by their names without the adapter.

    None if this process does not hold them whole, or if they are quantised.
    """
    digest, base = Digest(), _base_model(model)
    for name, tensor in base.named_parameters():
        if _is_of_adapter(name):
            continue
        elsewhere = hasattr(tensor, "to_local") or is_partitioned(tensor) or tensor.is_meta
        if elsewhere or not tensor.is_floating_point():
            return None
        digest += digest_torch(tensor_seed(name.replace(".base_layer", "")), integers(cast(tensor, dtype)))
    return digest.hex


class FrozenBase:
    """The weights that an adapter is trained on, which servers load once: they must stay as they are.

    Each rank watches what it holds of them: cast to the served dtype, or as they are if they are quantised.

    Args:
        model: a PEFT model.
        dtype: dtype that is served.
    """

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype):
        self._model = model
        self._dtype = dtype
        self._digests = self._now()

    def require_unchanged(self) -> None:
        """ConfigError, naming the first tensor, if a weight has changed since this was made. Reads all of them."""
        changed = [name for name, digest in self._now().items() if self._digests.get(name) != digest]
        if changed:
            raise ConfigError(
                f"{changed[0]} and {len(changed) - 1} other weights of the frozen base model have changed since the "
                "engine was made, for example because an adapter was merged into them and unmerged, which rounds. "
                "Servers compute with the original weights: load the base model and the adapter again, and make a new "
                "engine"
            )

    def _now(self) -> dict[str, Digest]:
        return {
            name: digest_torch(tensor_seed(name), self._bits(tensor))
            for name, tensor in _base_model(self._model).named_parameters()
            if not _is_of_adapter(name) and not is_partitioned(tensor) and not tensor.is_meta
        }

    def _bits(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() and tensor.element_size() > 1:
            return integers(cast(tensor, self._dtype))
        return local_part(tensor).detach().contiguous().view(-1).view(torch.uint8)


def require_same_adapter(run: Adapter | None, own: Adapter | None) -> None:
    """RunMismatch unless the adapters of a run and of the model in training have the same meaning."""
    if (run is None) != (own is None):
        raise RunMismatch(
            f"the run in the bucket publishes {'a whole model' if run is None else 'an adapter'}, and this trainer "
            f"{'a whole model' if own is None else 'an adapter'}: choose another prefix for a new run"
        )
    if run is None or own is None:
        return
    for key in _MEANING:
        if (run.config.get(key) or None) != (own.config.get(key) or None):
            raise RunMismatch(
                f"the run's adapter has {key}={run.config.get(key)!r}, this one {own.config.get(key)!r}: choose "
                "another prefix for a new run"
            )
    if None not in (run.base_digest, own.base_digest) and run.base_digest != own.base_digest:
        raise RunMismatch(
            f"the run's adapter was trained on other weights ({run.base.model or 'a base without a name'}) than those "
            "of this model: load that base, or choose another prefix for a new run"
        )


def _active(model: Any) -> tuple[str, Any]:
    """Name and config of the only active adapter."""
    active = getattr(model, "active_adapters", None)
    names = list(active() if callable(active) else active or ())
    if len(names) != 1 or names[0] not in model.peft_config:
        raise ConfigError(
            f"this PEFT model has the active adapters {names}, and exactly one is published: "
            "activate it with set_adapter"
        )
    return names[0], model.peft_config[names[0]]


def _require_servable(config: Any) -> None:
    kind = str(_plain(config.peft_type))
    if kind != "LORA":
        raise ConfigError(f"vLLM loads LoRA adapters, not PEFT's {kind}: train a LoraConfig, or all parameters")
    if config.bias != "none":
        raise ConfigError(f"vLLM loads no adapter with bias={config.bias!r}: train with LoraConfig(bias='none')")
    for setting, why in _UNSERVABLE.items():
        if getattr(config, setting, None):
            raise ConfigError(
                f"vLLM cannot load an adapter with {setting}, because {why}: train a LoraConfig without it"
            )
    start = config.init_lora_weights
    if isinstance(start, str) and start.lower() not in _INITIALISATIONS:
        raise ConfigError(
            f"init_lora_weights={start!r} changes the base model, which servers load as it is: leave it True, or use "
            f"one of {', '.join(_INITIALISATIONS)}"
        )


def _require_all_that_is_trained(model: torch.nn.Module, adapter: Iterable[torch.Tensor]) -> None:
    published = {id(tensor) for tensor in adapter}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in published:
            raise ConfigError(
                f"{name} is trained, but is no part of the published adapter: freeze it, or train all parameters "
                "without PEFT"
            )


def _base_model(model: Any) -> torch.nn.Module:
    base: torch.nn.Module = model.get_base_model()
    return base


def _is_of_adapter(name: str) -> bool:
    return any(segment.startswith("lora_") for segment in name.split("."))


def _plain(value: Any) -> Any:
    """The value as JSON."""
    if isinstance(value, enum.Enum):
        return value.value
    return sorted(value) if isinstance(value, set) else value
