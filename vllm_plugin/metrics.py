"""Prometheus series on vLLM's own `/metrics`: what the answers of its workers say. docs/operations.md lists them.

Nothing is asked for them: clients ask for the status several times for each version, and each answer updates the
series. A server that nobody follows shows what it last said.

Used here: `prometheus_client`, which vLLM needs; `served_model_name` of vLLM's configuration.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from hubsync.apply.protocol import PARAMETERS, REPORTING, WorkerMethod

logger = logging.getLogger("vllm.hubsync")

_LABELS = ("model_name", "engine")
_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class ServerMetrics:
    """The series of one API server process.

    Args:
        model_name: label of all series, as of vLLM's.
        registry: of `prometheus_client`; None for the one that `/metrics` shows.
    """

    def __init__(self, model_name: str, registry: Any = None):
        import prometheus_client

        registry = registry or prometheus_client.REGISTRY
        more = {"labelnames": _LABELS, "registry": registry}

        def gauge(name: str, text: str) -> Any:
            return prometheus_client.Gauge(f"vllm:hubsync_{name}", text, multiprocess_mode="mostrecent", **more)

        def seconds(name: str, text: str) -> Any:
            return prometheus_client.Histogram(f"vllm:hubsync_{name}_seconds", text, buckets=_SECONDS, **more)

        self._name = model_name
        self._version = gauge("version", "Version of the run that is served.")
        self._lag = gauge("lag_versions", "Versions from the served one to the one requested last.")
        self._ready = gauge("ready", "1 if the served weights are verified, else 0.")
        self._seconds = {
            "stage_s": seconds("stage", "Staging one version: download, decoding, placing. Generation goes on."),
            "commit_s": seconds("commit", "Writing one version into the live weights, on the slowest worker."),
            "verify_s": seconds("verify", "Computing the digest of all live weights. Generation goes on."),
        }
        self._turn = seconds("turn", "Turn of the engine's loop in which a commit was made: nothing else ran.")
        self._bytes = prometheus_client.Counter("vllm:hubsync_staged_bytes", "Bytes that workers downloaded.", **more)
        self._changed = prometheus_client.Counter("vllm:hubsync_changed_elements", "Elements written.", **more)
        self._failures = prometheus_client.Counter(
            "vllm:hubsync_failures", "Errors of workers, by class.", [*_LABELS, "type"], registry=registry
        )
        self._wanted: int | None = None  # the version requested last
        self._last: dict[str, dict[str, Any]] = {}  # by engine: what was counted

    def observing(self, rpc: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        """The engine client's `collective_rpc`, whose answers are taken in."""

        async def observed(method: Any, timeout: Any = None, args: Any = (), kwargs: Any = None) -> Any:
            answers = await rpc(method, timeout, args, kwargs)
            if isinstance(method, str) and method in PARAMETERS and isinstance(answers, list):
                try:
                    named = dict(zip(PARAMETERS[method], args, strict=False))
                    self.observe(method, {**named, **(kwargs or {})}, answers)
                except Exception:  # no series is worth a failed request
                    logger.exception("hubsync: the metrics of an answer were left out")
            return answers

        return observed

    def observe(self, method: str, arguments: Mapping[str, Any], answers: Sequence[Any]) -> None:
        """Take in the answers of all workers to a request."""
        engines: dict[str, list[dict[str, Any]]] = {}
        for answer in answers:
            if isinstance(answer, dict):
                engines.setdefault(str(answer.get("engine", {}).get("index", 0)), []).append(answer)
        if method in (WorkerMethod.STAGE, WorkerMethod.COMMIT) and isinstance(arguments.get("version"), int):
            self._wanted = arguments["version"]
        for engine, ranks in engines.items():
            self._observe_engine(method, engine, ranks)

    def _observe_engine(self, method: str, engine: str, ranks: list[dict[str, Any]]) -> None:
        labels, last = {"model_name": self._name, "engine": engine}, self._last.setdefault(engine, {})
        failures = [rank["error"] for rank in ranks if rank.get("error")]
        error = (failures[0].get("type"), failures[0].get("message")) if failures else None
        # A status repeats an error until the next job begins.
        if error is not None and (method not in REPORTING or error != last.get("error")):
            self._failures.labels(**labels, type=str(error[0])).inc()
        last["error"] = error
        if any("state" not in rank for rank in ranks):
            return
        versions = {rank.get("version") for rank in ranks}
        if len(versions) == 1 and isinstance(version := versions.pop(), int):
            self._version.labels(**labels).set(version)
            self._lag.labels(**labels).set((version if self._wanted is None else self._wanted) - version)
        self._ready.labels(**labels).set(all(rank.get("verification", {}).get("verified") for rank in ranks))
        self._count(method, labels, last, ranks)

    def _count(self, method: str, labels: dict[str, str], last: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
        """Each staging, commit and verification once."""
        committed = method == WorkerMethod.COMMIT and any(rank.get("changed") for rank in ranks)
        staged = [rank if committed else rank.get("staged") or {} for rank in ranks]
        digest = staged[0].get("digest")
        if digest != last.get("staged") and all(rank.get("digest") == digest is not None for rank in staged):
            last["staged"] = digest
            self._bytes.labels(**labels).inc(sum(rank.get("metrics", {}).get("stage_bytes", 0) for rank in ranks))
            self._time("stage_s", labels, ranks)
        passes = [rank.get("verification", {}).get("passes") for rank in ranks]
        if "passes" in last and passes != last["passes"]:
            self._time("verify_s", labels, ranks)
        last["passes"] = passes
        if committed:
            self._changed.labels(**labels).inc(sum(rank.get("changed") or 0 for rank in ranks))
            self._time("commit_s", labels, ranks)
            self._turn.labels(**labels).observe(max(float(rank["engine"].get("turn_s", 0.0)) for rank in ranks))

    def _time(self, name: str, labels: dict[str, str], ranks: list[dict[str, Any]]) -> None:
        if found := [float(rank["metrics"][name]) for rank in ranks if name in rank.get("metrics", {})]:
            self._seconds[name].labels(**labels).observe(max(found))
