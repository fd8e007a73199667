"""Checks of the installed TRL: which of its classes and attributes hubsync relies on, and whether they still exist.

Few of them are stable. `require_unmoved` checks one trainer class before it is used, and `moved` checks everything. A
TRL newer than the tested ones is used, with a warning, if it passes.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any

import trl
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration

from hubsync.errors import ConfigError

OLDEST, NEWEST_TESTED = (1, 13), (1, 16)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainerClass:
    """One trainer class.

    Attributes:
        module: module of the class.
        name: name of the class.
        uses: attributes that the trainer itself reads or writes and that hubsync relies on.
    """

    module: str
    name: str
    uses: tuple[str, ...]

    def load(self) -> type:
        return getattr(importlib.import_module(self.module), self.name)


_GENERATES = ("use_vllm", "vllm_generation", "sync_weights", "generate", "_metrics")
_BY_STEP = (*_GENERATES, "_last_loaded_step")
_BY_FREQUENCY = (*_GENERATES, "_last_vllm_sync_step", "vllm_sync_frequency")

# Subclasses (GMPO of GRPO, ServerDistillation of Distillation) belong to the family too.
FAMILY = (
    TrainerClass("trl.trainer.grpo_trainer", "GRPOTrainer", _BY_STEP),
    TrainerClass("trl.trainer.rloo_trainer", "RLOOTrainer", _BY_STEP),
    TrainerClass("trl.trainer.distillation_trainer", "DistillationTrainer", _BY_STEP),
    TrainerClass("trl.experimental.gold.gold_trainer", "GOLDTrainer", _BY_FREQUENCY),
    TrainerClass("trl.experimental.iw_opd.iw_opd_trainer", "IWOPDTrainer", _BY_FREQUENCY),
    TrainerClass("trl.experimental.sdft.sdft_trainer", "SDFTTrainer", _BY_STEP),
    TrainerClass("trl.experimental.sdpo.sdpo_trainer", "SDPOTrainer", _BY_STEP),
)

_TRANSFERS = (
    "weight_transfer",
    "rollout_worker",
    "rollout_queue",
    "vllm_client",
    "model_version",
    "_metrics",
    "_sync_weight",
    "_streaming_iter",
)

ASYNC = (
    TrainerClass("trl.experimental.async_grpo.async_grpo_trainer", "AsyncGRPOTrainer", _TRANSFERS),
    TrainerClass(
        "trl.experimental.async_distillation.async_distillation_trainer", "AsyncDistillationTrainer", _TRANSFERS
    ),
)

TRANSFER_METHODS = {"init_weight_transfer": 0, "pause": 0, "send_weights": 1, "resume": 0, "destroy": 0}


def require_unmoved(kind: type) -> None:
    """Raise ConfigError if the installed TRL has moved attributes of a trainer class that hubsync uses.

    Warns once per process if the installed TRL is newer than the tested ones.
    """
    asynchronous = trainer_class(kind, ASYNC)
    member = asynchronous or trainer_class(kind, FAMILY)
    assert member is not None, kind
    found = [*_unused(member), *(_moved_rollouts() if asynchronous else _moved_generation())]
    if found:
        raise ConfigError(
            f"this hubsync works with TRL {tested_range()}, and the installed {trl.__version__} differs: "
            f"{'; '.join(found)}. Install a TRL of that range"
        )
    if _is_untested(trl.__version__):
        _warn_of_untested(trl.__version__)


def tested_range() -> str:
    oldest, newest = (".".join(map(str, version)) for version in (OLDEST, NEWEST_TESTED))
    return f"{oldest} to {newest}"


def _is_untested(version: str) -> bool:
    found = re.match(r"(\d+)\.(\d+)", version)
    return found is not None and (int(found[1]), int(found[2])) > NEWEST_TESTED


@functools.cache
def _warn_of_untested(version: str) -> None:
    logger.warning(
        "TRL %s is newer than the tested ones (%s). It still has everything that hubsync uses, so it is used",
        version,
        tested_range(),
    )


def moved() -> list[str]:
    """Everything that hubsync uses and the installed TRL lacks, one sentence each."""
    unused = [text for member in (*FAMILY, *ASYNC) for text in _unused(member)]
    return [*_moved_generation(), *unused, *_moved_rollouts()]


def _moved_generation() -> Iterator[str]:
    taken = "model accelerator processing_class mode structured_outputs_regex server_base_url server_timeout logprobs "
    taken += "generation_kwargs repetition_penalty temperature top_p top_k min_p max_completion_length"
    yield from _lacks(VLLMGeneration.__init__, taken.split())
    for name in ("_init_vllm", "sync_weights", "generate"):
        yield from _lacks(getattr(VLLMGeneration, name, None), (), f"VLLMGeneration.{name}")
    if not {"_init_vllm", "server_timeout", "accelerator"} <= _names(VLLMGeneration.__init__.__code__):
        yield "VLLMGeneration.__init__ no longer sets itself up through _init_vllm"
    for name in ("_get", "_post", "generate"):
        yield from _lacks(getattr(VLLMClient, name, None), (), f"VLLMClient.{name}")


def _moved_rollouts() -> Iterator[str]:
    from trl.experimental.async_distillation import async_rollout_worker as distillation
    from trl.experimental.async_grpo import async_rollout_worker as grpo

    grpo_loop = {
        "_generate_one": ("prompt", "tool_dict", "tools", "group_id"),
        "_generate_one_turn": ("prompt_ids",),
        "_score_group": ("group",),
        "_post": ("path", "payload", "timeout"),
        "_retry": ("coro_factory", "label", "max_attempts"),
    }
    distillation_loop = {
        "_generate_and_score_one": ("prompt_id", "row"),
        "_generate_one_turn": ("prompt_ids",),
        "_post": ("base_url", "path", "payload", "timeout"),
        "_retry": ("coro_factory", "label", "max_attempts"),
    }
    for module, uses in ((grpo, grpo_loop), (distillation, distillation_loop)):
        where = "distillation's " if module is distillation else ""
        loop = getattr(module, "_AsyncRolloutLoop", None)
        for name, parameters in uses.items():
            yield from _lacks(getattr(loop, name, None), parameters, f"{where}_AsyncRolloutLoop.{name}")
        yield from _lacks(loop, ("model_name",), f"{where}_AsyncRolloutLoop")
        if "session" not in _names_of(loop, "_run_loops") or "vllm_server_url" not in _names_of(loop, "__init__"):
            yield f"{where}_AsyncRolloutLoop no longer keeps its session and vllm_server_url"
        if "_loop_kwargs" not in _names(module.AsyncRolloutWorker.__init__.__code__):
            yield f"{where}AsyncRolloutWorker no longer keeps the settings of its loop in _loop_kwargs"
        missing = {"model_version", "metrics"} - set(module.RolloutSample.__annotations__)
        if missing:
            yield f"{where}RolloutSample has no {', '.join(sorted(missing))}"
    if getattr(grpo.AsyncRolloutWorker, "_loop_cls", None) is not getattr(grpo, "_AsyncRolloutLoop", None):
        yield "AsyncRolloutWorker no longer runs the class in _loop_cls"
    if not {"_mp_ctx", "Process", "_child_main"} <= _names(distillation.AsyncRolloutWorker.start.__code__):
        yield "distillation's AsyncRolloutWorker no longer starts _child_main by _mp_ctx.Process"
    if "_AsyncRolloutLoop" not in _names(distillation._child_main.__code__):
        yield "distillation's _child_main no longer runs _AsyncRolloutLoop"
    for member in ASYNC:
        yield from _lacks(member.load(), ("weight_transfer",), f"the constructor of {member.name}")
        yield from _moved_merging(member)
        protocol = getattr(importlib.import_module(member.module), "WeightTransferProtocol", None)
        methods_of = {name: value for name, value in vars(protocol or object).items() if not name.startswith("_")}
        arity = {name: len(inspect.signature(value).parameters) - 1 for name, value in methods_of.items()}
        if arity != TRANSFER_METHODS:
            yield f"{member.name}'s WeightTransferProtocol is {arity}, not {TRANSFER_METHODS}"


def _moved_merging(member: TrainerClass) -> Iterator[str]:
    kind: Any = member.load()
    if "peft_config" not in inspect.signature(kind).parameters:  # before 1.14 there were no adapters, nor merging
        return
    merging = getattr(kind, "_sync_weight_merged", None)
    used = _names(merging.__code__) if inspect.isfunction(merging) else set()
    if not {"merge_adapter", "unmerge_adapter"} <= used:
        yield f"{member.name}._sync_weight_merged no longer merges adapters"


def _unused(member: TrainerClass) -> Iterator[str]:
    """Attributes that a trainer class no longer uses."""
    try:
        kind = member.load()
    except (ImportError, AttributeError) as error:
        yield f"{member.name} is not in {member.module} ({error})"
        return
    names: set[str] = set()
    for base in kind.__mro__:
        if base.__module__ == member.module:
            for value in vars(base).values():
                function = inspect.unwrap(value) if callable(value) else None
                if inspect.isfunction(function):
                    names |= _names(function.__code__)
    for name in member.uses:
        if name not in names:
            yield f"{member.name} no longer uses {name}"


def _names_of(kind: Any, method: str) -> set[str]:
    """Names in a method of a class; none if there is no such method."""
    function = getattr(kind, method, None)
    return _names(function.__code__) if inspect.isfunction(function) else set()


def _names(code: CodeType) -> set[str]:
    """Names of all attributes and globals in a function and the functions inside of it."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names(constant)
    return names


def _lacks(function: Any, parameters: Iterable[str], name: str | None = None) -> Iterator[str]:
    name = name or getattr(function, "__qualname__", str(function))
    if not callable(function):
        yield f"{name} does not exist"
        return
    has = inspect.signature(function).parameters
    missing = [parameter for parameter in parameters if parameter not in has]
    if missing:
        yield f"{name} does not take {', '.join(missing)}"


def trainer_class(kind: type, members: tuple[TrainerClass, ...]) -> TrainerClass | None:
    bases = {(base.__module__, base.__name__) for base in kind.__mro__}
    return next((member for member in members if (member.module, member.name) in bases), None)
