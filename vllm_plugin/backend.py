"""hubsync as a weight transfer backend of vLLM: `--weight-transfer-config '{"backend": "hubsync"}'`.

For clients that drive vLLM by its own calls:

    POST /init_weight_transfer_engine  {"init_info": {}}                          find out where the weights are
    POST /start_weight_update
    POST /update_weights               {"update_info": {"version": 42, "digest": "..."}}      fetch, verify, stage
    POST /pause?mode=keep
    POST /finish_weight_update         {"weight_version": "42"}                   commit, and label
    POST /resume

`pause` may also come first, but then requests wait while the update is fetched. The worker's session is the same that
the extension uses, so both can be loaded, and `hubsync_status` tells about either. Bucket and run are pinned when the
server starts; see the README.

Methods here never raise (see `extension`): a failure is kept, and the engine core asks for it after each call and
raises it. So vLLM does not label weights with a version that was not committed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from hubsync.errors import HubsyncError, ReplicaRefused
from hubsync.manifest import Position

from .extension import parse_position
from .session import Session
from .worker import session_of_model

_TIMEOUT_S = 600.0
_POLL_S = 0.005


@dataclass
class HubsyncInitInfo(WeightTransferInitInfo):
    """Nothing: bucket and run are pinned when the server starts."""


@dataclass
class HubsyncUpdateInfo(WeightTransferUpdateInfo):
    """The position to go to.

    Attributes:
        version: of the run.
        digest: of that version, 32 hex digits.
    """

    version: int
    digest: str


class HubsyncWeightTransferEngine(WeightTransferEngine[HubsyncInitInfo, HubsyncUpdateInfo]):
    """The worker's half of the backend."""

    init_info_cls = HubsyncInitInfo
    update_info_cls = HubsyncUpdateInfo

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._target: Position | None = None
        self._failure: str | None = None

    def take_failure(self) -> str | None:
        """What went wrong since it was asked last, once."""
        failure, self._failure = self._failure, None
        return failure

    def parse_init_info(self, init_dict: dict[str, Any]) -> Any:
        return init_dict  # read in `init_transfer_engine`, which keeps what is wrong with it

    def init_transfer_engine(self, init_info: Any) -> None:
        self._guarded(lambda: self._attach(init_info))

    def start_weight_update(self) -> None:
        self._target = None

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._guarded(lambda: self._stage(update_info))

    def receive_weights(self, update_info: HubsyncUpdateInfo) -> None:
        self.update_weights({"version": update_info.version, "digest": update_info.digest})

    def finish_weight_update(self) -> None:
        self._guarded(self._commit)

    @staticmethod
    def trainer_send_weights(*_args: Any, **_kwargs: Any) -> None:
        """vLLM 0.27 has the trainer's half here too."""
        raise ReplicaRefused("the trainer sends nothing to a server: it publishes into a bucket, see the README")

    def shutdown(self) -> None:
        self._target = None

    def _attach(self, init_info: Any) -> None:
        if init_info:
            raise ReplicaRefused(f"init_info must be empty, not {init_info!r:.200}: the run is pinned at launch")
        session = self._session()
        session.attach()
        _wait(session, "attaching")
        if session.ranks.size > 1:
            session.join()
            _wait(session, "attaching")
        session.require_attached()

    def _stage(self, update_info: Any) -> None:
        if not isinstance(update_info, dict) or update_info.keys() != {"version", "digest"}:
            raise ReplicaRefused(f"update_info must hold version and digest, not {update_info!r:.200}")
        # Even if this rank cannot stage it: the commit is a collective, and this rank must be there to refuse it.
        self._target = parse_position(update_info["version"], update_info["digest"])
        session = self._session()
        _wait(session, "applied")
        session.stage(self._target)
        _wait(session, "staging")
        session.require_staged(self._target)

    def _commit(self) -> None:
        target, self._target = self._target, None
        if target is not None:
            self._session().commit(target)

    def _session(self) -> Session:
        session = session_of_model(self._default_model)
        if session is None:
            raise ReplicaRefused("hubsync's plugin is not active in the engine core; is this vLLM supported?")
        return session

    def _guarded(self, do: Callable[[], None]) -> None:
        try:
            do()
        except HubsyncError as error:
            self._failure = str(error)
        except Exception as error:
            self._failure = f"{type(error).__name__}: {error}"


def _wait(session: Session, state: str) -> None:
    """Wait until the session has left this state, while its background thread works."""
    deadline = time.monotonic() + _TIMEOUT_S
    while session.state == state:
        if time.monotonic() > deadline:
            raise ReplicaRefused(f"still {state} after {_TIMEOUT_S:g} s; see the server's log")
        time.sleep(_POLL_S)
