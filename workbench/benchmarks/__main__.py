"""`python -m workbench.benchmarks W1 W2 --peers "ours,mlx-lm + same BLAS"`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from workbench.benchmarks.bench import Benchmark
from workbench.benchmarks.workloads import PEERS, WORKLOADS, chosen


def main() -> None:
    """Measure workloads, and write their tables to stdout."""
    parser = argparse.ArgumentParser(description="Measure this trainer against others.")
    parser.add_argument("workloads", nargs="*", default=list(WORKLOADS), help="such as W1 W3")
    parser.add_argument("--peers", default=",".join(PEERS), help="names, joined by commas")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layers", type=int, help="of the model, from the first")
    parser.add_argument("--rows", type=int, help="that are trained")
    parser.add_argument("--epochs", type=int, help="times that every row is used")
    parser.add_argument("--out", type=Path, help="folder for a JSON file of each workload")
    options = parser.parse_args()
    names = {name: getattr(options, name) for name in ("rows", "epochs")}
    changes = {name: value for name, value in names.items() if value is not None}
    peers = [peer.strip() for peer in options.peers.split(",")]
    with Benchmark(options.model, layers=options.layers, peers=peers, show=_tell) as bench:
        for workload in chosen(options.workloads):
            result = bench.run(workload, **changes)
            sys.stdout.write(f"{result}\n\n")
            if options.out:
                options.out.mkdir(parents=True, exist_ok=True)
                text = json.dumps(result.record(), indent=1)
                (options.out / f"{workload.name}.json").write_text(text)


def _tell(text: str) -> None:
    sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    main()
