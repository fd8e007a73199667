"""Training scripts of two processes on CPUs, started by `accelerate launch`, as on machines with GPUs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import accelerate.state
from accelerate.utils import DistributedType

ROOT = Path(__file__).parents[2]

# What a user launches with. `--cpu` would ask for MPI; ACCELERATE_USE_CPU has the scripts meet over gloo.
CONFIGS = ROOT / "examples" / "accelerate_configs"
_OPTIONS = {
    "ddp": [f"--config_file={CONFIGS / 'multi_gpu.yaml'}"],
    "fsdp2": [f"--config_file={CONFIGS / 'fsdp2.yaml'}"],
    "zero1": ["--use_deepspeed", "--zero_stage=1"],
    "zero2": ["--use_deepspeed", "--zero_stage=2"],
    "zero3": [f"--config_file={CONFIGS / 'zero3.yaml'}"],
}


def launch(how: str, module: str, *arguments: object) -> None:
    """Run `python -m module` on two ranks, "ddp" or "fsdp2"; the script calls `prepare(how)` before anything else."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", *_OPTIONS[how], "--num_processes=2"]
    command += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", f"--main_process_port={port}"]
    done = subprocess.run(
        [*command, "--module", module, how, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": _path(), "OMP_NUM_THREADS": "1", **_device(how)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def prepare(how: str) -> None:
    """Stands in for two lists in accelerate, on which CPUs are missing: of devices that it shards models on, and of the
    backends that DeepSpeed's ranks speak to each other.

    On others `AcceleratorState` ignores the FSDP options. All that shards is torch's, accelerate's and DeepSpeed's own.
    """
    if how.startswith("zero"):
        accelerate.state.PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_CPU)
    if how != "fsdp2":
        return
    make = accelerate.state.AcceleratorState.__init__

    def make_sharded(self, *arguments, fsdp_plugin=None, **settings):
        make(self, *arguments, fsdp_plugin=fsdp_plugin, **settings)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            accelerate.state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    accelerate.state.AcceleratorState.__init__ = make_sharded


def _device(how: str) -> dict[str, str]:
    return {"DS_ACCELERATOR": "cpu"} if how.startswith("zero") else {"ACCELERATE_USE_CPU": "true"}


def _path() -> str:
    """Also what this process was given, which may be another TRL."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
