"""Subprocess of `test_pipe`: one vLLM engine loads a checkpoint, optionally follows a run, and says what it generates.

    python -m tests.support.engine_run SPEC.json REPORT.json

SPEC: `checkpoint`, `options` (of vLLM's `LLM`), `targets` (positions to go to, in order), `prompts` (token ids), and
`image_prompt` (token ids with one placeholder), or null. With one, all prompts are answered before the first target
too, so that caches of the vision tower's outputs are filled.
REPORT: `error`, or null; `memory`, a hash of every tensor that a model reaches, for each rank by name; `answers`,
tokens and log-probabilities of each prompt and its greedy continuation.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from hubsync.apply.protocol import WorkerMethod, WorkerState
from vllm_plugin import exam

_TOKENS, _LOGPROBS = 8, 3


def _numbers(positions: Any) -> list[dict[str, float]]:
    return [{str(token): found.logprob for token, found in position.items()} for position in positions if position]


def _prompts(spec: Any) -> list[dict[str, Any]]:
    prompts: list[dict[str, Any]] = [{"prompt_token_ids": prompt} for prompt in spec["prompts"]]
    if spec.get("image_prompt"):
        import numpy as np
        from PIL import Image

        pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        image = {"image": Image.fromarray(pixels)}
        prompts.append({"prompt_token_ids": spec["image_prompt"], "multi_modal_data": image})
    return prompts


def _answers(engine: exam._Engine, prompts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0, max_tokens=_TOKENS, ignore_eos=True, logprobs=_LOGPROBS, prompt_logprobs=_LOGPROBS,
        detokenize=False,
    )  # fmt: skip
    outputs = engine._llm.generate(prompts, sampling)
    return [
        {
            "tokens": list(output.outputs[0].token_ids),
            "logprobs": _numbers(output.outputs[0].logprobs),
            "prompt_logprobs": _numbers(output.prompt_logprobs),
        }
        for output in outputs
    ]


def main(spec_file: str, report_file: str) -> None:
    spec = json.loads(Path(spec_file).read_text())
    report: dict[str, Any] = {"error": None}
    engine = exam._Engine(spec["checkpoint"], spec["options"])
    prompts = _prompts(spec)
    try:
        if spec.get("image_prompt"):
            _answers(engine, prompts)
        if spec["targets"]:
            engine.attach(report)
        for version, digest in spec["targets"]:
            engine.ask(WorkerMethod.STAGE, version, digest)
            engine.settled(WorkerState.STAGED)
            engine.ask(WorkerMethod.COMMIT, version, digest)
            engine.settled(WorkerState.READY)
        report["memory"] = engine.ask(exam.memory_of)
        report["answers"] = _answers(engine, prompts)
    except exam._Refused as refused:
        report["error"] = refused.args[0]
    Path(report_file).write_text(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
