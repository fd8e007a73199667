"""The trainer's half of vLLM's weight transfer, for trainers built on its interface (vLLM >= 0.27).

    vllm serve MODEL --weight-transfer-config '{"backend": "hubsync"}'      with HUBSYNC_BUCKET, on the inference host

Importing this module registers the backend `hubsync` with vLLM's `WeightTransferTrainerFactory`. vLLM's registry lives
in one process and has no entry points, so a trainer has to import it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

try:
    from vllm.distributed.weight_transfer.base import TrainerInitInfo, TrainerWeightTransferEngine, VLLMWeightSyncClient
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    if "backend" not in TrainerInitInfo.__annotations__:  # 0.26 has another interface of that name
        raise ImportError("its TrainerInitInfo has no backend")
except ImportError as error:
    raise ImportError(
        f"hubsync.integrations.vllm_trainer needs vLLM >= 0.27 in the trainer's environment ({error}). "
        "DeltaWeightTransferEngine with SyncConfig(servers=[...]) needs no vLLM there"
    ) from error

from hubsync.errors import ConfigError, ReplicaError
from hubsync.publish.config import SyncConfig
from hubsync.publish.engine import DeltaWeightTransferEngine
from hubsync.publish.results import Published

BACKEND = "hubsync"


@dataclass
class HubsyncTrainerInitInfo(TrainerInitInfo):
    """What the trainer's half is made of. vLLM's own `rank` is keyword-only; rank 0 drives the server.

    Attributes:
        model: the model being trained; this rank's shard of it under FSDP2 and DeepSpeed.
        optimizer: its optimizer. None compares with a copy of the model at each transfer.
        config: bucket and settings. `servers` stays empty: vLLM's client reaches the server.
    """

    backend: ClassVar[str] = BACKEND

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer | None
    config: SyncConfig


class HubsyncTrainerWeightTransferEngine(TrainerWeightTransferEngine[HubsyncTrainerInitInfo]):
    """Publishes what changed, and has vLLM's client stage and commit it.

    Every rank publishes what it owns. Nothing is gathered, so there is no `WeightSource`.

    Attributes:
        engine: the publisher of this rank.
        published: the newest transfer; None before the first.

    Raises:
        ConfigError: a source or servers were given, or the engine refuses the model or a setting.
        BucketError: the version could not be stored. The next transfer contains its changes.
        ReplicaError: the server refused a call; the message is the server's.

    Usage:

    ```python
    >>> from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient
    >>> from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
    >>> from hubsync import SyncConfig
    >>> from hubsync.integrations.vllm_trainer import HubsyncTrainerInitInfo

    >>> transfer = WeightTransferTrainerFactory.trainer_init(
    ...     HubsyncTrainerInitInfo(model, optimizer, SyncConfig(bucket="hf://buckets/me/rl/run1"), rank=0),
    ...     client=HTTPVLLMWeightSyncClient("http://rollouts:8000"),
    ... )
    >>> transfer.send_weights()  # after a step
    ```
    """

    init_info_cls = HubsyncTrainerInitInfo

    def __init__(self, engine: DeltaWeightTransferEngine, client: VLLMWeightSyncClient, *, is_sender: bool = True):
        super().__init__(client=client, is_sender=is_sender)
        self.engine = engine
        self.published: Published | None = None

    @classmethod
    def trainer_init(
        cls, init_info: HubsyncTrainerInitInfo, *, client: VLLMWeightSyncClient, source: Any = None
    ) -> HubsyncTrainerWeightTransferEngine:
        """Create or continue the run, then attach the server to it. A collective."""
        if source is not None:
            raise ConfigError("hubsync takes no WeightSource: it follows HubsyncTrainerInitInfo(model, optimizer, ...)")
        if init_info.config.servers:
            raise ConfigError("leave SyncConfig.servers empty: vLLM's client reaches the server")
        engine = DeltaWeightTransferEngine(init_info.model, init_info.optimizer, init_info.config)
        transfer = cls(engine, client, is_sender=init_info.is_sender)
        try:
            transfer._call(lambda: client.init_weight_transfer_engine({}))
        except BaseException:
            engine.close()
            raise
        return transfer

    def send_weights(self) -> None:
        """Return when the server serves the current weights. A collective: an error of one rank is raised on all."""
        published = self.engine.ranks.together(self.engine.publish().result)
        self._call(lambda: self._commit(published))
        self.published = published

    def shutdown(self) -> None:
        """Stop following the optimizer. The server keeps its version."""
        self.engine.close()

    def _commit(self, published: Published) -> None:
        self.client.start_weight_update()
        self.client.update_weights({"version": published.version, "digest": published.digest})
        self.client.finish_weight_update(weight_version=str(published.version))

    def _call(self, do: Callable[[], None]) -> None:
        """Have the first rank use the client."""
        self.engine.ranks.first(lambda: _stating_reasons(do))


def _stating_reasons(do: Callable[[], None]) -> None:
    """vLLM's HTTP client raises a status without the server's reason."""
    try:
        do()
    except OSError as error:  # requests' errors
        response = getattr(error, "response", None)
        reason = str(error) if response is None else f"{error}: {response.text}"
        raise ReplicaError(f"the server did not take the weights: {reason}") from error


WeightTransferTrainerFactory.register_engine(BACKEND, HubsyncTrainerWeightTransferEngine)
