"""What trainer and server hold after many versions: memory, threads, descriptors, cached bytes.

    python -m benchmarks.soak                     300 publishes, each committed on a real server
    python -m benchmarks.soak --publishes 50 --json

Needs vLLM and Linux. The Hub, the server, its bucket and the optimizer are real; the gradients are random.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from hubsync.demo.serving import ServerProcess
from hubsync.localhub import LocalHub
from hubsync.publish.config import SyncConfig
from hubsync.publish.engine import DeltaWeightTransferEngine
from hubsync.replicas.replica import Replica

from .apply import write_checkpoint

ADDRESS = "hf://buckets/me/soak/run"
RATE = 1e-5


@dataclass(frozen=True)
class Row:
    """One process, or the processes of the server together.

    Attributes:
        publishes: how many were committed before.
        who: "trainer" or "server".
        memory: resident bytes.
        threads, descriptors: numbers.
        cached: bytes of the process's download cache.
    """

    publishes: int
    who: str
    memory: int
    threads: int
    descriptors: int
    cached: int


def measure(publishes: int) -> list[Row]:
    import transformers

    at = {1, publishes // 2, publishes}
    rows = []
    with tempfile.TemporaryDirectory() as name, LocalHub(Path(name) / "hub") as hub:
        root = Path(name)
        write_checkpoint(root / "base", small=True)
        os.environ.update(
            HF_ENDPOINT=hub.url,
            HF_TOKEN="hf_local",
            HF_XET_CACHE=str(root / "xet"),
            HUBSYNC_CACHE=str(root / "trainer"),
        )
        model = transformers.AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.float32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)
        with ServerProcess(
            root / "base",
            root / "log",
            bucket=ADDRESS,
            environment={"HUBSYNC_CACHE": str(root / "cache")},
            arguments=["--skip-tokenizer-init"],
        ) as process:
            replica = Replica(process.wait_ready())
            config = SyncConfig(bucket=ADDRESS, servers=[process.url], compaction=True)
            with DeltaWeightTransferEngine(model, optimizer, config) as engine:
                for number in range(1, publishes + 1):
                    for parameter in model.parameters():
                        parameter.grad = torch.randn_like(parameter)
                    optimizer.step()
                    engine.sync(number)
                    if number in at:
                        replica.wait_verified(engine.position)
                        rows.append(_row(number, "trainer", [os.getpid()], root / "trainer"))
                        rows.append(_row(number, "server", list(_tree(process.pid)), root / "cache"))
    return rows


def _row(publishes: int, who: str, processes: list[int], cache: Path) -> Row:
    status = [_status(pid) for pid in processes]
    return Row(
        publishes,
        who,
        sum(1024 * int(one["VmRSS"].split()[0]) for one in status),
        sum(int(one["Threads"]) for one in status),
        sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in processes),
        sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()),
    )


def _status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _tree(pid: int) -> Iterator[int]:
    """A process and its descendants."""
    yield pid
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield from _tree(int(child))


def print_table(rows: list[Row]) -> None:
    table = Table("publishes", "process", "memory", "threads", "descriptors", "cache", title="After N publishes")
    for row in rows:
        table.add_row(
            str(row.publishes),
            row.who,
            f"{row.memory / 1e6:.0f} MB",
            str(row.threads),
            str(row.descriptors),
            f"{row.cached / 1e6:.1f} MB",
        )
    Console(width=100).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--publishes", type=int, default=300)
    parser.add_argument("--json", action="store_true", help="print a JSON list of rows and nothing else")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(arguments.publishes)
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        print_table(rows)


if __name__ == "__main__":
    main()
