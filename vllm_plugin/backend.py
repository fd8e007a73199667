"""The weight transfer backend: hubsync behind vLLM's own HTTP calls.

    vllm serve MODEL --weight-transfer-config '{"backend": "hubsync"}'

    POST /init_weight_transfer_engine   {"init_info": {}}                                attach to the run
    POST /start_weight_update
    POST /update_weights                {"update_info": {"version": 42, "digest": "..."}}    stage that version
    POST /finish_weight_update          {"weight_version": "42"}                         commit it

The weights come from the bucket that was pinned at launch, not from the caller. The methods here only begin:
`vllm_plugin.native` waits in the engine core until the workers are attached, or have staged, while vLLM generates. They
raise; `vllm_plugin.worker.call` turns their errors into answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from hubsync.apply.session import Session
from hubsync.apply.worker_methods import position_of
from hubsync.errors import ReplicaRefused
from hubsync.format.manifest import Position


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Empty: the run is pinned when the server is started."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """A position of the run.

    Attributes:
        version: its number.
        digest: of the published view there, 32 hex digits.
    """

    version: int
    digest: str


class HubsyncWeightTransferEngine(WeightTransferEngine):
    """Adapter between vLLM's weight transfer calls and the worker's session.

    Attributes:
        session: the worker's; set by `vllm_plugin.worker.call` before any other method is called.
        target: the position of the update under way.
    """

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False  # draft layers of the checkpoint are part of every update

    session: Session
    target: Position | None = None

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        self.session.attach()

    def start_weight_update(self) -> None:
        self.target = None

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # vLLM's own ends with a wait for the accelerator, which raises on CPUs; nothing is written here.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: UpdateInfo) -> None:
        target = position_of(update_info.version, update_info.digest)
        self.session.stage(target)
        self.target = target

    def finish_weight_update(self) -> None:
        if self.target is None:
            raise ReplicaRefused("nothing was staged: call update_weights with a version and its digest first")
        self.session.commit(self.target)
        self.target = None

    @staticmethod
    def trainer_send_weights(*_args: Any, **_kwargs: Any) -> None:
        """In vLLM 0.27 the trainer's half is here too."""
        raise ReplicaRefused("the trainer sends nothing to a server: it publishes into a bucket, see the README")

    def shutdown(self) -> None:
        """Nothing to release: the session belongs to the worker."""
