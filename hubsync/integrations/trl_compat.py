"""TRL internals: everything that hubsync uses and that TRL does not promise to keep.

Tested with the releases from `trl_checks.OLDEST` to `NEWEST_TESTED`. Two groups of trainers:

* Trainers of the `VLLMGeneration` family (`FAMILY`) use one object to synchronise and to generate.
  `generate_on_server` replaces it in a built trainer. `HubSyncCallback` drives it.
* The asynchronous trainers (`ASYNC`) take a weight transfer in their constructor, which is public. Four changes are
  not: all ranks take part in the transfer (`join_transfer`), adapters are not merged for it (`keep_adapter_apart`) but
  requested by name (`roll_out_with`), and samples record the weights that made them (`date_samples`, with the loops of
  `trl_rollouts`, which run in TRL's rollout process). `HubWeightTransfer` drives them.

`trl_checks.moved` compares the used attributes with the installed TRL and describes the differences.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import trl
from trl.generation import vllm_client
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration

from hubsync.errors import ConfigError, ReplicaUnreachable
from hubsync.replicas.http_client import ServerAccess, trusts_environment
from hubsync.replicas.vllm_http import VLLMServer
from hubsync.retry import retry

from .trl_checks import ASYNC, FAMILY, TrainerClass, trainer_class

logger = logging.getLogger(__name__)

# --- the family of VLLMGeneration


def family_of(trainer: Any) -> TrainerClass | None:
    """The supported class that a trainer is an instance of."""
    return trainer_class(type(trainer), FAMILY)


def what_fits(trainer: Any) -> str:
    """What publishes the policy of this trainer, for errors of integrations that do not."""
    if family_of(trainer) is not None:
        return "use HubSyncCallback(trainer, config)"
    if takes_weight_transfer(trainer):
        return "pass it weight_transfer=HubWeightTransfer(config), and call transfer.attach(trainer)"
    return (
        "use a DeltaWeightTransferEngine, in a callback that calls its publish or sync after optimizer steps "
        "(docs/trainers.md, Any other trainer)"
    )


def server_url(args: Any) -> str:
    """URL of the vLLM server in a TRL configuration."""
    host = getattr(args, "vllm_server_host", None)
    return (args.vllm_server_base_url or f"http://{host}:{args.vllm_server_port}").rstrip("/")


def generate_on_server(trainer: Any, server: VLLMServer, synchronise: Callable[[], None]) -> None:
    """Make a trainer that was built with `use_vllm=False` generate on a server.

    Args:
        server: the server, whose client is used for a moment; later requests are TRL's.
        synchronise: called on all ranks before a generation if an optimizer step was made since the previous one.
    """
    trainer.vllm_generation = _HTTPGeneration(trainer, server, synchronise)
    trainer.use_vllm, trainer.vllm_mode = True, "server"
    frequency = getattr(trainer.args, "vllm_sync_frequency", None)
    if frequency is None:
        trainer._last_loaded_step = -1  # no step's weights are loaded yet
    else:
        trainer.vllm_sync_frequency, trainer._last_vllm_sync_step = frequency, -frequency


def generates_on_server(trainer: Any) -> bool:
    """Whether `generate_on_server` was called for this trainer."""
    return isinstance(getattr(trainer, "vllm_generation", None), _HTTPGeneration)


def generate_without_server(trainer: Any) -> None:
    """Undo `generate_on_server`."""
    trainer.vllm_generation, trainer.use_vllm = None, False


def request_model(trainer: Any, name: str) -> None:
    """Request the trainer's completions from this model of its server. Main process only."""
    trainer.vllm_generation.vllm_client.model = name


class _HTTPGeneration(VLLMGeneration):
    """TRL's generation backend for a server, without NCCL and without the `vllm` package."""

    def __init__(self, trainer: Any, server: VLLMServer, synchronise: Callable[[], None]):
        self._synchronise = synchronise
        self._server = server
        args = trainer.args
        super().__init__(
            model=trainer.model,
            accelerator=trainer.accelerator,
            processing_class=trainer.processing_class,
            mode="server",
            structured_outputs_regex=getattr(args, "vllm_structured_outputs_regex", None),
            server_base_url=server.url,
            server_timeout=args.vllm_server_timeout,
            # Logprobs of the sampled tokens, for the importance sampling correction. One objective of IWOPD needs none.
            logprobs=0 if getattr(args, "distillation_objective", "iw_opd") == "iw_opd" else None,
            generation_kwargs=getattr(args, "generation_kwargs", None),
            **_sampling(trainer),
        )

    def _init_vllm(self) -> None:
        if self.accelerator.is_main_process:
            self.vllm_client = _HTTPClient(self._server, self.server_timeout)
        self.accelerator.wait_for_everyone()

    def sync_weights(self) -> None:
        """Return once the server generates with the weights of the last optimizer step. Collective."""
        self._synchronise()


class _HTTPClient(VLLMClient):
    """The generating part of TRL's client. It never opens a communicator."""

    def __init__(self, server: VLLMServer, timeout: float):
        self._server = server
        self.base_url = server.url
        self.session = vllm_client.requests.Session()
        self.session.trust_env = trusts_environment(server.url)
        if server.access.headers:
            self.session.auth = _Credentials(server.access)
        _wait_for(server, timeout)
        self.model = self._get(f"{server.url}/v1/models")["data"][0]["id"]

    def _post(self, url: str, **arguments: Any) -> Any:
        answer = super()._post(url, **arguments)
        return _with_token_names(answer) if url.endswith("/inference/v1/generate") else answer

    def logprobs_mode(self) -> str | None:
        """The server's `--logprobs-mode`; None if it does not tell."""
        return self._server.logprobs_mode()


def _with_token_names(answer: dict[str, Any]) -> dict[str, Any]:
    """Answers to prompts with images, as TRL reads them: vLLM 0.32 states the ids of tokens as numbers."""
    contents = [choice["logprobs"]["content"] for choice in answer["choices"] if choice.get("logprobs")]
    for entry in (entry for content in contents for entry in content or ()):
        for token in (entry, *entry.get("top_logprobs", ())):
            if "token_id" in token:
                token.setdefault("token", f"token_id:{token['token_id']}")
    return answer


@dataclass(frozen=True)
class _Credentials:
    """Authentication of `requests`. As headers of the session, the credentials would give way to those of `.netrc`."""

    access: ServerAccess

    def __call__(self, request: Any) -> Any:
        request.headers.update(self.access.headers)
        return request


def _sampling(trainer: Any) -> dict[str, Any]:
    """The trainer's sampling settings. A setting is an attribute of the trainer, only of its arguments, or missing."""
    names = ("repetition_penalty", "temperature", "top_p", "top_k", "min_p", "max_completion_length")
    found = {name: getattr(trainer, name, getattr(trainer.args, name, None)) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def _wait_for(server: VLLMServer, timeout: float) -> None:
    """Wait until the server is up. Logs why it is not at once, and raises it after `timeout` seconds."""

    def require_health() -> None:
        if not server.health():
            raise ReplicaUnreachable(f"{server.url} answers, but is not a running vLLM server (/health): check the URL")

    what = f"{server.url} (vllm_server_timeout)"
    retry(require_health, timeout=timeout, on=ReplicaUnreachable, waiting_for=what, longest=1.0)


# --- the asynchronous trainers


def takes_weight_transfer(trainer: Any) -> bool:
    return trainer_class(type(trainer), ASYNC) is not None


def join_transfer(trainer: Any, take_part: Callable[[], None]) -> None:
    """Replace TRL's gathering of weights by a call of `take_part` on the other ranks. Call it on every rank.

    TRL gathers each weight on all ranks and streams it to `send_weights` on the main rank. After this call nothing is
    streamed, and the other ranks call `take_part` instead.
    """

    def stream() -> Iterator[tuple[str, Any]]:
        if not trainer.accelerator.is_main_process:
            take_part()
        return iter(())

    trainer._streaming_iter = stream


def keep_adapter_apart(trainer: Any) -> None:
    """Stop TRL from merging an adapter into its base around each transfer. Call it on every rank.

    Merging and unmerging round, so the base would drift away from the servers' base.

    Raises:
        ConfigError: this TRL does not train adapters asynchronously.
    """
    merged = getattr(trainer, "_sync_weight_merged", None)
    if merged is None:
        raise ConfigError(f"TRL {trl.__version__} trains no adapters in {type(trainer).__name__}: install TRL >= 1.14")

    def apart(*arguments: Any) -> Any:
        with _doing_nothing(trainer.accelerator.unwrap_model(trainer.model), "merge_adapter", "unmerge_adapter"):
            return merged(*arguments)

    trainer._sync_weight_merged = apart


@contextmanager
def _doing_nothing(owner: Any, *methods: str) -> Iterator[None]:
    """Replace these inherited methods of an object by no-ops during the context."""
    for name in methods:
        setattr(owner, name, lambda *_, **__: None)
    try:
        yield
    finally:
        for name in methods:
            delattr(owner, name)


def authorize(trainer: Any, server: VLLMServer) -> None:
    """Have the trainer's own requests to its server carry the server's credentials. Main process only.

    For the requests of TRL's rollout process see `date_samples`.
    """
    trainer.vllm_client = _TrainersClient(server, trainer.args.vllm_server_timeout)


class _TrainersClient:
    """What a trainer with a weight transfer still asks of its server by itself. TRL's client sends no credentials."""

    def __init__(self, server: VLLMServer, timeout: float):
        self._server = server
        self._timeout = timeout

    def wait_for_server_ready(self) -> None:
        _wait_for(self._server, self._timeout)

    def get_max_model_len(self) -> int:
        return self._server.max_model_len()


def roll_out_with(trainer: Any, model: str) -> bool:
    """Request samples from this model of the servers. Main process only, before TRL's rollout process starts.

    Returns:
        False, with no effect, if the rollout worker is not TRL's.
    """
    settings = getattr(trainer.rollout_worker, "_loop_kwargs", {})
    if "model_name" not in settings:
        return False
    settings["model_name"] = model
    return True


def date_samples(trainer: Any, access: ServerAccess, date: Callable[[Any, int], None]) -> bool:
    """Record in every sample the server's versions of its weights, and date it before the trainer checks its age.

    Works with TRL's own workers only. Main process only, between construction and training.

    Args:
        access: of the server that generates; requests for samples carry its credentials.
        date: called with every sample and its oldest version (`trl_rollouts.UNKNOWN` for weights of no version of the
            run). The sample's metrics hold the range as `trl_rollouts.OLDEST` and `trl_rollouts.NEWEST`.

    Returns:
        False, with no effect, for other workers.
    """
    from . import trl_rollouts  # heavy, and experimental in TRL

    worker = trainer.rollout_worker
    if type(worker) is trl_rollouts.distillation.AsyncRolloutWorker:
        worker._mp_ctx = _Processes(worker._mp_ctx, trl_rollouts.distill)  # type: ignore[assignment]
    elif getattr(worker, "_loop_cls", None) is trl_rollouts.grpo._AsyncRolloutLoop:
        worker._loop_cls = trl_rollouts.DatedRollouts
    else:
        return False
    worker._loop_kwargs |= {"vllm_server_url": access.url, trl_rollouts.HEADERS: access.headers}
    trainer.rollout_queue = _DatedQueue(trainer.rollout_queue, trl_rollouts.OLDEST, date)
    return True


class _Processes:
    """A multiprocessing context whose processes run another main function with the arguments of TRL's."""

    def __init__(self, context: Any, main: Callable[..., None]):
        self._context = context
        self._main = main

    def Process(self, *, target: Any, **settings: Any) -> Any:
        return self._context.Process(target=self._main, **settings)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


class _DatedQueue:
    """TRL's queue of samples. Dates each sample as it is taken out."""

    def __init__(self, queue: Any, oldest: str, date: Callable[[Any, int], None]):
        self._queue = queue
        self._oldest = oldest
        self._date = date

    def get(self, *args: Any, **kwargs: Any) -> Any:
        sample = self._queue.get(*args, **kwargs)
        self._date(sample, int(sample.metrics[self._oldest]))
        return sample

    def __getattr__(self, name: str) -> Any:
        return getattr(self._queue, name)


# --- metrics


def log_row(trainer: Any, metrics: dict[str, float], step: int) -> None:
    """Log values under `weight_sync/` as a row of a step, which may be an earlier one."""
    logs = {f"weight_sync/{name}": value for name, value in metrics.items()}
    trainer.state.log_history.append({**logs, "step": step})
    then = copy(trainer.state)
    then.global_step = step
    trainer.control = trainer.callback_handler.on_log(trainer.args, then, trainer.control, logs)


def record(trainer: Any, metrics: dict[str, float]) -> None:
    """Log values under `weight_sync/` with the trainer's next metrics."""
    for name, value in metrics.items():
        trainer._metrics["train"][f"weight_sync/{name}"].append(float(value))
