"""`hubsync doctor`: check whether a model can be synced exactly."""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from hubsync.errors import ConfigError
from hubsync.progress import note

if TYPE_CHECKING:
    import torch

HELP = "check whether a model can be synced exactly, on real vLLM engines"
DESCRIPTION = """\
Load the model as vLLM would, report how each tensor lies in memory, apply a random 1 % delta in place, compare every
tensor of the served model bit for bit with a fresh load of the patched checkpoint, undo the delta and compare again.
Exit code 0: exact. 1: a mismatch, or a refusal with its reason.

With --environment instead of a model: print every version that is installed here, whether it is tested, and what to
change. Exit code 1: something must be changed.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, nargs="?", metavar="MODEL_DIR", help="a checkpoint in safetensors files")
    parser.add_argument(
        "--environment", action="store_true", help="look at the installed packages and settings instead"
    )
    parser.add_argument(
        "--random",
        action="store_true",
        help="use random weights: MODEL_DIR needs only a config.json (and processor and tokenizer, if it sees images)",
    )
    parser.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N", help="as for vllm serve")
    parser.add_argument("--pipeline-parallel-size", type=int, default=1, metavar="N", help="as for vllm serve")
    parser.add_argument("--enable-expert-parallel", action="store_true", help="as for vllm serve")
    parser.add_argument("--dtype", default="bfloat16", help="dtype that vLLM serves (default: %(default)s)")
    parser.add_argument(
        "--max-model-len", type=int, default=256, metavar="N", help="of the test engines (default: %(default)s)"
    )
    parser.add_argument("--attention-backend", metavar="NAME", help="as for vllm serve, e.g. CPU_MLA")
    parser.add_argument("--trust-remote-code", action="store_true", help="as for vllm serve")
    parser.add_argument(
        "--dense-fallback", action="store_true", help="reload tensors that cannot be changed in place, at every commit"
    )
    parser.add_argument(
        "--workdir",
        type=Path,
        metavar="DIR",
        help="directory for the patched copy of the checkpoint (default: a temporary directory)",
    )
    parser.add_argument("--json", action="store_true", help="print only one JSON object")


def run(args: argparse.Namespace) -> int:
    if args.environment == (args.model is not None):
        raise ConfigError("give a MODEL_DIR, or --environment, and not both")
    return _environment(args) if args.environment else _examine(args)


def _environment(args: argparse.Namespace) -> int:
    from hubsync.doctor.environment import CHANGE, examine_environment
    from hubsync.doctor.report import print_environment

    findings = examine_environment()
    fits = all(finding.verdict != CHANGE for finding in findings)
    if args.json:
        print(json.dumps({"fits": fits, "findings": [asdict(finding) for finding in findings]}))
    else:
        print_environment(findings)
    return 0 if fits else 1


def _examine(args: argparse.Namespace) -> int:
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError("the doctor runs vLLM engines, and vLLM is not installed here: pip install vllm")
    from hubsync.doctor.diagnosis import examine
    from hubsync.doctor.random_model import make_random_checkpoint
    from hubsync.doctor.report import next_steps, print_diagnosis
    from hubsync.doctor.trial import make_trial

    with TemporaryDirectory(dir=args.workdir, prefix="hubsync-doctor-") as name:
        workdir = Path(name)
        note("making a copy of the checkpoint with a random 1 % delta" + " and random weights" * args.random)
        base = make_random_checkpoint(args.model, workdir / "random") if args.random else args.model.resolve()
        trial = make_trial(base, workdir, dtype=_published_dtype(args.dtype))
        diagnosis = examine(trial, _engine_options(args), workdir)
    if args.json:
        print(json.dumps({"exact": diagnosis.exact, **asdict(diagnosis)}, indent=2))
    else:
        print_diagnosis(diagnosis)
        print("\n" + "\n".join(next_steps(diagnosis, _serve_command(args))))
    return 0 if diagnosis.exact else 1


def _serve_command(args: argparse.Namespace) -> str:
    """How to serve the model as it was examined."""
    options = [
        *(["--tensor-parallel-size", str(args.tensor_parallel_size)] if args.tensor_parallel_size > 1 else []),
        *(["--pipeline-parallel-size", str(args.pipeline_parallel_size)] if args.pipeline_parallel_size > 1 else []),
        *(["--enable-expert-parallel"] if args.enable_expert_parallel else []),
        *(["--attention-backend", args.attention_backend] if args.attention_backend else []),
        *(["--trust-remote-code"] if args.trust_remote_code else []),
    ]
    variables = "HUBSYNC_BUCKET=ADDRESS VLLM_PLUGINS=hubsync" + (" HUBSYNC_DENSE_FALLBACK=1" * args.dense_fallback)
    fixed = f"--dtype {args.dtype} --worker-extension-cls vllm_plugin.DeltaWorkerExtension"
    return " ".join([variables, "vllm serve", shlex.quote(str(args.model)), fixed, *options])


def _published_dtype(served: str) -> torch.dtype:
    """The dtype of a run that a server of this dtype follows in place: float16, or the default."""
    import torch

    return torch.float16 if served in ("float16", "half") else torch.bfloat16


def _engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of vLLM's `LLM`."""
    chosen: dict[str, Any] = {
        "tensor_parallel_size": args.tensor_parallel_size,
        "pipeline_parallel_size": args.pipeline_parallel_size,
        "enable_expert_parallel": args.enable_expert_parallel,
        "dtype": args.dtype,
        "max_model_len": args.max_model_len,
        "max_num_seqs": 4,
        "enforce_eager": True,
        "trust_remote_code": args.trust_remote_code,
    }
    if args.attention_backend:
        chosen["attention_backend"] = args.attention_backend
    if args.dense_fallback:
        chosen["additional_config"] = {"hubsync": {"dense_fallback": True}}
    return chosen
