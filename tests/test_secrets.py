"""Secrets stay out of all output. Errors are provoked with marked secrets, and everything that came out is searched.

Searched are standard output and error, the log of every library at level DEBUG, the text, repr and traceback of each
error with its causes, and the repr of objects. The echoing server stands in for gateways that repeat what they were
sent.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import traceback
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from hubsync import DeltaWeightTransferEngine, SyncConfig
from hubsync.bucket import open_bucket
from hubsync.cli.main import main
from hubsync.errors import HubsyncError
from hubsync.format.keys import PublicKey, SigningKey
from hubsync.lifecycle.rollouts.sampler import Sampler
from hubsync.localhub import LocalHub
from hubsync.replicas.deployment import Deployment
from hubsync.replicas.engines import connect
from hubsync.replicas.follower import Follower
from hubsync.replicas.replica import Replica
from tests.support.tiny import Tiny

SIGNING_KEY = "5e" * 32
API_KEY = "sk-marked-api-key"
HUB_TOKEN = "hf_markedhubtoken"
PASSWORD = "marked/pass:word"
URL_PASSWORD = "marked-url-password"
PROXY_PASSWORD = "marked-proxy-password"
ENCODED = "bWU6bWFya2VkLXVybC1wYXNzd29yZA=="  # me:marked-url-password
SECRETS = (SIGNING_KEY, API_KEY, HUB_TOKEN, PASSWORD, URL_PASSWORD, PROXY_PASSWORD, ENCODED)

CLOSED = "127.0.0.1:9"  # the discard port: nothing listens


class Watch:
    """Collects output. `attempt` makes a call that may fail."""

    def __init__(self, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]):
        self._caplog = caplog
        self._capfd = capfd
        self._texts: list[str] = []
        self.failures = 0

    def attempt(self, call: Callable[[], object]) -> None:
        try:
            self.show(call())
        except BaseException as error:  # argparse raises SystemExit
            self.failures += 1
            self._texts += ["".join(traceback.format_exception(error)), repr(error), str(error)]

    def show(self, *objects: object) -> None:
        self._texts += [f"{thing!r} {thing!s}" for thing in objects]

    def assert_clean(self) -> None:
        captured = self._capfd.readouterr()
        records = [f"{record.getMessage()} {record.args!r} {record.exc_text}" for record in self._caplog.records]
        output = "\n".join([*self._texts, captured.out, captured.err, *records])
        shown = {secret: output[max(0, output.find(secret) - 300) :][:600] for secret in SECRETS if secret in output}
        assert shown == {}
        assert len(output) > 100, "nothing came out: the paths were not taken"


@pytest.fixture
def watch(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> Watch:
    caplog.set_level(logging.DEBUG)
    return Watch(caplog, capfd)


@pytest.fixture(params=[200, 307, 401, 403, 404, 422, 429, 500, 503])
def echo(request: pytest.FixtureRequest) -> Iterator[str]:
    """`host:port` of a server that answers with this status and repeats the request's headers and path."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            content = json.dumps({"error": {"message": f"{self.path}: {dict(self.headers)}"}, "results": [1]}).encode()
            self.send_response(request.param)
            if request.param == 307:
                self.send_header("Location", f"http://{CLOSED}{self.path}")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_PUT = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listener.serve_forever, args=(0.02,), daemon=True).start()
    yield f"127.0.0.1:{listener.server_port}"
    listener.shutdown()
    listener.server_close()


def ask_everything(watch: Watch, url: str, api_key: str | None) -> None:
    """Every call of hubsync that talks to a server."""
    server = connect(url, api_key, timeout=2.0)
    watch.show(server, Replica(server), server.url, getattr(server, "access", None))
    for call in (
        server.version,
        server.world_size,
        server.pause,
        server.resume,
        server.generate_a_token,
        lambda: server.load_adapter("policy", "/adapter"),
        lambda: server.rpc("hubsync_status"),
        Replica(server).check,
        Replica(server).attach,
        Follower(lambda: None, Replica(server)).step,  # type: ignore[arg-type,return-value]
    ):
        watch.attempt(call)
    deployment = Deployment([url], api_key=api_key, request_timeout=2.0)
    watch.show(deployment)
    watch.attempt(deployment.status)
    watch.attempt(lambda: deployment.wait_ready(timeout=0))
    watch.attempt(lambda: deployment.warm_up(retries=1, timeout=0))
    deployment.close()

    async def sample() -> None:
        async with Sampler([url], api_key=api_key, patience=0.3, poll_s=0.1, attempts=1, timeout=2.0) as sampler:
            async for taken in sampler.sample(["x"], 1):
                watch.show(taken)

    watch.attempt(lambda: asyncio.run(sample()))


def test_of_servers_that_repeat_what_they_were_sent(watch: Watch, echo: str) -> None:
    ask_everything(watch, f"http://{echo}", API_KEY)
    ask_everything(watch, f"http://me:{URL_PASSWORD}@{echo}/gateway/", None)
    assert watch.failures >= 20
    watch.assert_clean()


def test_of_servers_that_do_not_answer(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    ask_everything(watch, f"http://{CLOSED}", API_KEY)
    ask_everything(watch, f"http://me:{URL_PASSWORD}@{CLOSED}", None)
    monkeypatch.setenv("http_proxy", f"http://me:{PROXY_PASSWORD}@{CLOSED}")
    ask_everything(watch, "http://inference.invalid", API_KEY)
    watch.assert_clean()


@pytest.mark.parametrize("scheme", ["ftp", "socks9", "http"])
def test_of_proxies_that_cannot_be_used(watch: Watch, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for proxy in (f"{scheme}://me:{PROXY_PASSWORD}@{CLOSED}", f"{scheme}://me:{PROXY_PASSWORD}@[:1"):
        monkeypatch.setenv("http_proxy", proxy)
        watch.attempt(lambda: connect("http://inference.invalid", API_KEY, timeout=1.0).version())
        watch.attempt(lambda: Deployment(["http://inference.invalid"], api_key=API_KEY).status())
    watch.assert_clean()


@pytest.mark.parametrize(
    "url",
    [
        f"me:{URL_PASSWORD}@host:8000",
        f"http://me:{URL_PASSWORD}@host:port",
        f"http://me:{PASSWORD}@host:8000",
        f"http://me:{URL_PASSWORD}@[host",
        f"sgl://me:{URL_PASSWORD}@host",
        f"http://me:{URL_PASSWORD}@host\n",
    ],
)
def test_of_addresses_that_cannot_work(watch: Watch, url: str, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    watch.attempt(lambda: SyncConfig(bucket=run, servers=[url]))
    watch.attempt(lambda: SyncConfig(bucket=run, servers=url))  # type: ignore[arg-type]
    watch.attempt(lambda: SyncConfig(bucket=run, servers=[url, url]))
    watch.attempt(lambda: DeltaWeightTransferEngine(Tiny(), None, SyncConfig(bucket=run, servers=[url])))
    watch.attempt(lambda: Deployment([url]))
    watch.attempt(lambda: Deployment(url))
    watch.attempt(lambda: Sampler([url]))
    watch.attempt(lambda: connect(url))
    watch.attempt(lambda: main(["follow", "--once", "--bucket", run, "--server", url]))
    watch.attempt(lambda: open_bucket(f"s3://{url.rpartition('://')[2]}"))
    watch.assert_clean()


def test_of_settings(watch: Watch) -> None:
    config = SyncConfig(
        bucket=f"toy://me:{PASSWORD}@store",
        token=HUB_TOKEN,
        signing_key=SIGNING_KEY,
        api_key=API_KEY,
        servers=[f"http://me:{URL_PASSWORD}@host"],
    )
    watch.show(config, [config], SyncConfig(bucket="run"))
    assert "token=***, signing_key=***" in repr(config)
    assert "token=None" in repr(SyncConfig(bucket="run"))
    for setting in ("token", "signing_key", "api_key"):
        for value in ([SIGNING_KEY, API_KEY], HUB_TOKEN.encode(), {API_KEY: 1}):
            watch.attempt(lambda s=setting, v=value: SyncConfig(bucket="run", **{s: v}))
    for key in (f"{API_KEY}\n{API_KEY}", f"{API_KEY}é"):
        watch.attempt(lambda k=key: connect("http://host", k))
        watch.attempt(lambda k=key: Sampler(["http://host"], api_key=k))
    assert watch.failures == 13
    watch.assert_clean()


def test_of_keys(watch: Watch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = str(tmp_path / "run")
    key = SigningKey.load(SIGNING_KEY)
    watch.show(key, key.public, open_bucket(run, create=True, key=key))
    with DeltaWeightTransferEngine(Tiny(), None, SyncConfig(bucket=run, signing_key=SIGNING_KEY)) as engine:
        watch.show(engine, engine.run, engine.config)
    for broken in (SIGNING_KEY[:-1], f"{SIGNING_KEY}0", SIGNING_KEY.replace("5", "S")):
        watch.attempt(lambda k=broken: SigningKey.load(k))
        watch.attempt(lambda k=broken: DeltaWeightTransferEngine(Tiny(), None, SyncConfig(bucket=run, signing_key=k)))
        watch.attempt(lambda k=broken: main(["serve", run, "newest", "--signing-key", k]))
    watch.attempt(lambda: DeltaWeightTransferEngine(Tiny(), None, SyncConfig(bucket=run)))  # the run is signed
    watch.attempt(lambda: main(["ls", run, "--public-key", PublicKey("0" * 64).hex]))
    monkeypatch.setenv("HUBSYNC_SIGNING_KEY", SIGNING_KEY)
    for command in (["serve", run, "9"], ["gc", run, "--keep-last", "1"], ["compact", run], ["repair", run]):
        watch.attempt(lambda c=command: main(c))
    watch.attempt(lambda: main(["keygen", str(tmp_path / "made.key")]))
    watch.attempt(lambda: main(["keygen", str(tmp_path / "made.key")]))
    (tmp_path / "run" / "run.json").write_text("{}")
    for command in (["ls", run], ["serve", run, "0"]):
        watch.attempt(lambda c=command: main(c))
    watch.assert_clean()


def test_of_the_hub(watch: Watch, local_hub: LocalHub, hub_address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_and_write() -> None:
        for token in (HUB_TOKEN, f"{HUB_TOKEN}\n", f"{HUB_TOKEN}é"):
            watch.attempt(lambda t=token: open_bucket(hub_address, token=t))
            watch.attempt(
                lambda t=token: DeltaWeightTransferEngine(Tiny(), None, SyncConfig(bucket=hub_address, token=t))
            )
            for command in ("ls", "verify", "repair"):
                watch.attempt(lambda c=command, t=token: main([c, hub_address, "--token", t]))

    monkeypatch.setenv("HF_ENDPOINT", local_hub.url)
    read_and_write()  # the token is not one of the Hub's
    monkeypatch.setenv("HF_TOKEN", HUB_TOKEN)
    watch.attempt(lambda: main(["ls", hub_address]))
    local_hub.reset()
    watch.assert_clean()


def test_errors_hide_users_of_urls_wherever_they_come_from() -> None:
    error = HubsyncError(f"https://me:{URL_PASSWORD}@host/path?x=1 and hf://{HUB_TOKEN}@hub, not me@example.com", 1)
    assert error.args == ("https://***@host/path?x=1 and hf://***@hub, not me@example.com", 1)
    assert isinstance(error.args[1], int)
