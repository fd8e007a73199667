"""HTTP client of one vLLM server's control endpoints: the [`InferenceServer`] of vLLM.

Every failure becomes a `ReplicaError` that says what to do. `hubsync.replicas.replica` decides in which order the
endpoints are called.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import httpx

from hubsync.apply.protocol import CONTROL_PATH, PARAMETERS, REPORTING, control_path, error_from_json
from hubsync.errors import ReplicaRefused, ReplicaUnreachable, ReplicaUnsuitable

from .http_client import API_KEY_VARIABLE, access_to, new_client, whole_answer
from .server import checked_url

OLDEST = (0, 26)

CONTROL_HINT = (
    "start it with VLLM_PLUGINS=hubsync in its environment (or, on a private network, VLLM_SERVER_DEV_MODE=1)"
)
LORA_HINT = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment"
EXTENSION_HINT = "start it with --worker-extension-cls vllm_plugin.DeltaWorkerExtension"

_CONNECTION_ERRORS = (
    httpx.NetworkError,
    httpx.ConnectTimeout,
    httpx.WriteTimeout,
    httpx.RemoteProtocolError,
    httpx.ProxyError,
)

_NO_DOOR = (401, 403, 404, 405)  # of a proxy, too, that lets only some paths through

T = TypeVar("T")

_VERSION = re.compile(r"(\d+)\.(\d+)")


class VLLMServer:
    """One vLLM server.

    Args:
        url: base URL, for example `http://10.0.0.7:8000`, or `https://user:password@gateway/rollouts`.
        api_key: the server's `--api-key`, or the token of the proxy in front of it; default is the environment variable
            `VLLM_API_KEY`. A user in the URL goes first.
        timeout: seconds to wait for any one answer. A paused or busy server answers between two forward passes, so this
            must be longer than the longest forward pass.

    Attributes:
        access: its URL and credentials, for other clients of the same server.
    """

    def __init__(self, url: str, api_key: str | None = None, *, timeout: float = 120.0):
        self.access = access_to(checked_url(url), api_key)
        self.url = self.access.url
        self.timeout = timeout
        self._http = new_client(self.access)
        self._development = False  # were vLLM's development endpoints the ones that answered last?

    def close(self) -> None:
        """Close all connections. Call it after the last request has returned."""
        self._http.close()

    def health(self) -> bool:
        """True if the server is up; ReplicaUnreachable if nothing listens."""
        return not self._send("GET", "/health", refuse=False).is_error

    def version(self) -> str:
        """vLLM's version; ReplicaUnsuitable if it is older than hubsync supports."""
        version = str(self._get("/version").get("version", ""))
        found = _VERSION.match(version)
        # Source builds without tags call themselves 0.1.dev...; nothing can be read from those.
        released = (int(found[1]), int(found[2])) if found and "dev" not in version else None
        if released is not None and released < OLDEST:
            raise ReplicaUnsuitable(
                f"{self.url} runs vLLM {version}; hubsync needs vLLM >= {OLDEST[0]}.{OLDEST[1]}: upgrade the server"
            )
        return version

    def world_size(self) -> int:
        """Workers of the server: tensor x pipeline x data parallel."""
        return self._read("/get_world_size", lambda answer: int(answer["world_size"]), control=True)

    def pause(self) -> None:
        """Freeze all requests between two forward passes until `resume`. KV caches stay."""
        self._json(self._control("POST", "/pause", {"params": {"mode": "keep", "clear_cache": "false"}}), "/pause")

    def resume(self) -> None:
        self._json(self._control("POST", "/resume"), "/resume")

    def is_paused(self) -> bool:
        return self._read("/is_paused", lambda answer: bool(answer["is_paused"]), control=True)

    def reset_prefix_cache(self) -> bool:
        """Drop all cached prefixes. Returns False and drops nothing while a running request holds blocks."""
        return bool(self._post("/reset_prefix_cache")["success"])

    def weight_version(self) -> str:
        return self._read("/weight_info", lambda answer: str(answer["weight_version"]), control=True)

    def logprobs_mode(self) -> str | None:
        """The server's `--logprobs-mode`; None if neither hubsync's endpoints nor the development ones state it."""
        for path in (CONTROL_PATH, "/server_info?config_format=json"):
            answer = self._request("GET", path)
            if answer.status_code in _NO_DOOR:
                continue
            document = self._json(self._checked(answer, path, True), path)
            mode = document.get("logprobs_mode", _model_config(document).get("logprobs_mode"))
            if mode is not None:
                return str(mode)
        return None

    def max_model_len(self) -> int:
        """Longest sequence of the served model, in tokens."""
        return self._read("/v1/models", lambda answer: int(answer["data"][0]["max_model_len"]))

    def generate_a_token(self) -> None:
        """Have the model run once, on a prompt of one token."""
        model = self._read("/v1/models", lambda answer: answer["data"][0]["id"])
        self._post("/v1/completions", json={"model": model, "prompt": [1], "max_tokens": 1, "temperature": 0.0})

    def require_stated_versions(self, model: str | None) -> None:
        """Raise ReplicaUnsuitable unless responses state which weights made their tokens. Generates one token.

        Args:
            model: name to request; None for the served model.
        """
        path, unknown = "/inference/v1/generate", f"{self.url} reports no weight versions of samples"
        request = {"model": model, "token_ids": [1], "sampling_params": {"max_tokens": 1, "ignore_eos": True}}
        answer = self._request("POST", path, json=request)
        if answer.status_code in (403, 404):  # newer versions forbid endpoints that were not enabled
            raise ReplicaUnsuitable(
                f"{unknown}: start it with --enable-scale-out ({path} answered {answer.status_code})"
            )
        try:
            stated = bool(answer.json()["choices"][0].get("weight_versions"))
        except (ValueError, LookupError, TypeError, AttributeError):
            stated = False
        if not stated:
            raise ReplicaUnsuitable(f"{unknown}: hubsync needs vLLM >= 0.32 there ({self._message(answer)})")

    def load_adapter(self, name: str, path: str) -> None:
        """Have vLLM serve the LoRA adapter in a directory of the server's host, to requests for the model `name`.

        An adapter of this name that is already loaded is unloaded first.
        """
        adapter = {"lora_name": name, "lora_path": path}
        try:
            if name in (model["id"] for model in self._get("/v1/models")["data"]):
                self._send("POST", "/v1/unload_lora_adapter", json={"lora_name": name})
            self._send("POST", "/v1/load_lora_adapter", json=adapter)
        except ReplicaUnsuitable as error:
            raise ReplicaUnsuitable(f"{error}; for adapters with --enable-lora and {LORA_HINT}") from None

    def rpc(self, method: str, *args: Any) -> list[dict[str, Any]]:
        """Call a worker method on every rank.

        Returns:
            one dict per rank, in rank order.

        Raises:
            the error that the first refusing rank names (a class of `hubsync.errors`; ReplicaRefused if it names
            none of them), ReplicaUnsuitable if the workers have no such method.
        """
        answer = self._call(method, args)
        if answer.status_code == 500:
            self._explain_rpc_failure(method, answer)
        results = self._json(answer, answer.url.path).get("results")
        if not isinstance(results, list) or not all(isinstance(result, dict) for result in results) or not results:
            shown = self.access.hide(repr(results))[:200]
            raise ReplicaUnsuitable(f"{self.url}: {method} answered {shown}; {EXTENSION_HINT}, same version")
        for rank, result in enumerate(results):
            if method not in REPORTING and result.get("error"):
                raise error_from_json(result["error"], f"{self.url}: rank {rank} refused {method}: ")
        return results

    def _call(self, method: str, args: tuple[Any, ...]) -> httpx.Response:
        body = {"method": method, "args": list(args), "timeout": self.timeout}
        if method not in PARAMETERS:
            return self._send("POST", "/collective_rpc", json=body, refuse=False)
        named = dict(zip(PARAMETERS[method], args, strict=False))
        own = control_path(method).removeprefix(CONTROL_PATH)
        return self._control("POST", own, {"json": body}, {"json": named}, theirs="/collective_rpc", refuse=False)

    def _control(
        self,
        verb: str,
        path: str,
        request: dict[str, Any] | None = None,
        own_request: dict[str, Any] | None = None,
        *,
        theirs: str | None = None,
        refuse: bool = True,
    ) -> httpx.Response:
        """Send a request to hubsync's own endpoints, else to vLLM's development endpoints: whichever the server has.

        Args:
            path: of the own endpoint, after `/v1/hubsync`.
            request: of the development endpoint.
            own_request: of the own endpoint; None for an empty one.
            theirs: path of the development endpoint, if it is another one.
        """
        doors = {CONTROL_PATH + path: own_request or {}, theirs or path: request or {}}
        answers = {}
        for door in reversed(doors) if self._development else doors:
            answers[door] = self._request(verb, door, **doors[door])
            if answers[door].status_code not in _NO_DOOR:
                self._development = not door.startswith(CONTROL_PATH)
                return self._checked(answers[door], door, refuse)
        own, other = doors
        self._development = False
        chosen = own if answers[own].status_code in (401, 403) else other
        return self._checked(answers[chosen], chosen, refuse)

    def _explain_rpc_failure(self, method: str, answer: httpx.Response) -> NoReturn:
        text = self._message(answer)
        if method in text and ("no attribute" in text or "not implemented" in text):
            raise ReplicaUnsuitable(f"{self.url}: its workers have no {method}; {EXTENSION_HINT}")
        raise ReplicaRefused(f"{self.url}: {method} failed: {text}; see the server's log")

    def _message(self, answer: httpx.Response) -> str:
        """The readable core of an error response, shortened."""
        return self.access.hide(_message(answer))[:300]

    def _read(self, path: str, read: Callable[[dict[str, Any]], T], *, control: bool = False) -> T:
        """`read(answer)`; ReplicaUnsuitable if the answer lacks what it reads."""
        answer = self._json((self._control if control else self._send)("GET", path), path)
        try:
            return read(answer)
        except (LookupError, TypeError, ValueError):
            shown = self.access.hide(repr(answer))[:300]
            raise ReplicaUnsuitable(f"{self.url}{path} does not answer like a vLLM server: {shown}") from None

    def _get(self, path: str) -> dict[str, Any]:
        return self._json(self._send("GET", path), path)

    def _post(self, path: str, **request: Any) -> dict[str, Any]:
        return self._json(self._send("POST", path, **request), path)

    def _request(self, verb: str, path: str, **request: Any) -> httpx.Response:
        try:
            return whole_answer(self._http, verb, self.url + path, self.timeout, **request)
        except httpx.ReadTimeout as error:
            late = "gave no answer" if not str(error).startswith("the answer") else "did not complete its answer"
            raise ReplicaUnreachable(f"{self.url}{path} {late} in {self.timeout:g} s") from None
        except _CONNECTION_ERRORS as error:
            reason = str(error) or type(error).__name__
            raise ReplicaUnreachable(f"cannot connect to {self.url}: is the vLLM server up? ({reason})") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ReplicaUnreachable(f"{self.url}{path} failed: {error}") from None

    def _send(self, verb: str, path: str, *, refuse: bool = True, **request: Any) -> httpx.Response:
        return self._checked(self._request(verb, path, **request), path, refuse)

    def _checked(self, answer: httpx.Response, path: str, refuse: bool) -> httpx.Response:
        """The answer; errors that have the same reason for every path are raised."""
        if answer.is_error and answer.history:  # other hosts get no credentials, and some redirects turn POST into GET
            raise ReplicaUnsuitable(f"{self.url} redirects to {answer.url}: give the address of that server")
        if answer.status_code in (401, 403):
            wanted = "another API key than the one given" if self.access.headers else "an API key, and none was given"
            raise ReplicaUnsuitable(
                f"{self.url} wants {wanted}: use that of its --api-key, or the token of the proxy in front of it "
                f"(SyncConfig(api_key=...), `hubsync follow --api-key`, or {API_KEY_VARIABLE})"
            )
        if answer.status_code == 404 and path == "/version":
            raise ReplicaUnsuitable(
                f"no vLLM server answers at {self.url} (404 for {path}): check the address, with the path of a proxy, "
                f"and the API key ({API_KEY_VARIABLE}): a private Space answers so without a token"
            )
        if answer.status_code == 404 and path != "/health":
            raise ReplicaUnsuitable(f"{self.url} has no {path}; {CONTROL_HINT}")
        if answer.status_code in (502, 503, 504):
            raise ReplicaUnreachable(f"{self.url}{path} answered {answer.status_code}: is the vLLM server up?")
        if refuse and answer.is_error:
            raise ReplicaRefused(f"{self.url}{path} answered {answer.status_code}: {self._message(answer)}")
        return answer

    def _json(self, answer: httpx.Response, path: str) -> dict[str, Any]:
        try:
            document = answer.json()
        except (ValueError, RecursionError):
            document = None
        if answer.is_error or not isinstance(document, dict):
            raise ReplicaUnsuitable(f"{self.url}{path} does not answer like a vLLM server: {self._message(answer)}")
        return document


def _model_config(document: dict[str, Any]) -> dict[str, Any]:
    """The model's part of an answer of `/server_info`."""
    config = document.get("vllm_config")
    model = config.get("model_config") if isinstance(config, dict) else None
    return model if isinstance(model, dict) else {}


def _message(answer: httpx.Response) -> str:
    try:
        document = answer.json()
    except ValueError:
        return answer.text
    if isinstance(document, dict):
        error = document.get("error", document)
        document = error.get("message", error) if isinstance(error, dict) else error
    return str(document)
