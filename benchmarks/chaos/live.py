"""Real vLLM servers in histories: a small checkpoint, and the process that controls one server."""

from __future__ import annotations

import shutil
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from hubsync.demo.compare import greedy
from hubsync.demo.serving import ServerProcess
from hubsync.errors import HubsyncError
from hubsync.format.keys import PUBLIC_KEY_VARIABLE
from hubsync.format.manifest import Position
from hubsync.replicas.replica import Replica
from hubsync.replicas.vllm_http import VLLMServer

from .actors import PID_FILE, Failed, Report, Setup, download_anchor, obey

_PROMPTS = ("3 + 4 =", "0 + 0 = it is 0 . 5 + 2 =")


def base(pipe: Connection, setup: Setup) -> None:
    """Make a tiny random bf16 Qwen3 with a tokenizer; answer True, and end."""
    import transformers

    from hubsync.demo.task import make_tokenizer

    config = transformers.Qwen3Config(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    transformers.AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(setup.base)
    make_tokenizer().save_pretrained(setup.base)
    pipe.send(True)


def replica(
    pipe: Connection, setup: Setup, home: Path, port: int, ranks: int, from_anchor: bool, model: Path | None = None
) -> None:
    """As `actors.replica`, with a vLLM server, of the checkpoint `model` if given. Also answers ("behave",)."""
    assert ranks == 1
    cache = home / "cache"
    try:
        checkpoint = model or (_loadable(setup, download_anchor(setup, cache)) if from_anchor else setup.base)
    except HubsyncError as error:
        pipe.send(Failed(type(error).__name__, str(error)))
        return
    environment = {"HUBSYNC_CACHE": str(cache)}
    if setup.public_key is not None:
        environment[PUBLIC_KEY_VARIABLE] = setup.public_key.hex
    home.mkdir(exist_ok=True)
    process = ServerProcess(
        checkpoint,
        home / "vllm.log",
        bucket=setup.address,
        environment=environment,
        arguments=["--port", str(port), "--worker-extension-cls", "benchmarks.chaos.probe.Probe"],
    )
    (home / PID_FILE).write_text(str(process.pid))
    process.url = f"http://127.0.0.1:{port}"
    server = process.wait_ready(setup.patience_s)
    pipe.send(port)
    obey(
        pipe,
        Replica(server),
        setup,
        cache,
        report=lambda: _report(server),
        flip=lambda seed: str(server.rpc("chaos_flip", seed)[0]["where"]),
        behave=lambda: _behaviour(server),
    )


def _loadable(setup: Setup, anchor: Path) -> Path:
    """Add what an anchor of the toy policy lacks, which is no Hugging Face model: config and tokenizer."""
    for file in setup.base.glob("*.json"):
        if not file.name.startswith("model") and not (anchor / file.name).exists():
            shutil.copy(file, anchor)
    return anchor


def _report(server: VLLMServer) -> Report:
    (rank,) = server.rpc("chaos_memory")
    status = rank["status"]
    position = None if status["version"] is None else Position(status["version"], status["digest"])
    memory = {name: bytes.fromhex(value) for name, value in rank["tensors"].items()}
    return Report((status["state"],), (position,), (memory,))


def _behaviour(server: VLLMServer) -> dict[str, Any]:
    """Every parameter and buffer as vLLM lays them out, and generated tokens with their log probabilities."""
    (rank,) = server.rpc("chaos_memory")
    return {"parameters": rank["parameters"], "log probabilities": greedy(server.url, _PROMPTS)}
