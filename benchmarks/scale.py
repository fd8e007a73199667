"""What larger models, more replicas and other links would take, computed from measured rates: docs/scale.md.

    python -m benchmarks.scale                         70B and 235B; 8, 64 and 1,000 replicas; 1 to 100 Gb/s
    python -m benchmarks.scale --lr 3e-6 --json

Nothing is run here. Rates of one GPU, sizes of deltas and round trips are those of `hubsync size`
(`hubsync.cli.sizing`), each measured by the command named there.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table

from hubsync.cli import sizing
from hubsync.format.encoding import Encoding

GPUS = 8
"""Of one host."""

RELAY = 100e9
"""bit/s that a relay in the servers' site sends to them, an assumption."""

NCCL = 470e9 / 4.75
"""Bytes of weights per second that NCCL moves between the halves of a cluster. NeMo-RL reports 4.6 to 4.9 s for 235B
and 0.48 to 0.67 s for 30B (NeMo-RL #2413); not measured here."""

ROUND_TRIP = 0.05
"""Seconds for a request to the Hub, an assumption."""

REPLICAS = (8, 64, 1000)
LINKS = (1e9, 10e9, 25e9, 100e9)


@dataclass(frozen=True)
class Model:
    """A model, the GPUs that train it, and those of one replica."""

    name: str
    parameters: int
    trainer: int
    replica: int


MODELS = (Model("70B", 70_000_000_000, 64, 2), Model("235B-A22B", 235_000_000_000, 128, 4))


@dataclass(frozen=True)
class Row:
    """Seconds from the publish call to the last commit, and what crosses the network.

    Attributes:
        link: bit/s to the Hub.
        alone: every host has a link, and every replica downloads for itself.
        shared: every host has a link, and its replicas share a cache (`HUBSYNC_CACHE`).
        site: the same caches, and one link for all hosts of the servers' site.
        relayed: one download for that site, which a relay sends to the hosts meanwhile.
        hub_bytes: that the Hub sends to caches of hosts.
        nccl: all weights by NCCL inside one cluster. The servers wait for all of it.
    """

    model: str
    replicas: int
    link: float
    delta_bytes: int
    alone: float
    shared: float
    site: float
    relayed: float
    hub_bytes: int
    nccl: float


def row(model: Model, replicas: int, link: float, delta: sizing.DeltaSize) -> Row:
    """One case. Hosts are full, and have a link each."""
    bits, hosts = 8.0 * delta.nbytes, math.ceil(replicas * model.replica / GPUS)
    per_host = min(replicas, GPUS // model.replica)
    fixed = (
        sizing.publishing(model.parameters, delta, model.trainer)
        + bits / link / math.ceil(model.trainer / GPUS)  # each host uploads its share
        + sizing.ROUND_TRIPS * ROUND_TRIP
        + sizing.serving(model.parameters, delta, model.replica)
    )
    return Row(
        model.name,
        replicas,
        link,
        delta.nbytes,
        alone=fixed + per_host * bits / link,
        shared=fixed + bits / link,
        site=fixed + hosts * bits / link,
        relayed=fixed + max(bits / link, hosts * bits / RELAY),
        hub_bytes=hosts * delta.nbytes,
        nccl=2 * model.parameters / NCCL,
    )


def rows(lr: float, encoding: Encoding) -> Iterator[Row]:
    for model in MODELS:
        weights = sizing.normal_weights(model.parameters)
        delta = sizing.delta(weights, lr * sizing.SETTLED, encoding)
        for replicas in REPLICAS:
            for link in LINKS:
                yield row(model, replicas, link, delta)


def _show(found: Sequence[Row]) -> None:
    table = Table(
        "model", "replicas", "link", "delta", "alone", "shared cache", "one link", "relay", "from the Hub", "NCCL"
    )
    for each in found:
        table.add_row(
            each.model,
            f"{each.replicas:,}",
            f"{each.link / 1e9:g} Gb/s",
            f"{each.delta_bytes / 1e9:.2f} GB",
            *(f"{seconds:.1f} s" for seconds in (each.alone, each.shared, each.site, each.relayed)),
            f"{each.hub_bytes / 1e9:.1f} GB",
            f"{each.nccl:.1f} s",
        )
    Console(width=120).print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lr", type=float, default=1e-6, help="learning rate (default: %(default)g)")
    parser.add_argument("--encoding", type=Encoding, choices=[Encoding.FAST, Encoding.COMPACT], default=Encoding.FAST)
    parser.add_argument("--json", action="store_true", help="print a JSON list of rows and nothing else")
    options = parser.parse_args(arguments)
    found = list(rows(options.lr, options.encoding))
    if options.json:
        print(json.dumps([asdict(each) for each in found], indent=1))
    else:
        _show(found)


if __name__ == "__main__":
    main()
