"""Say what works on this machine, and how to cure what does not.

Each line is ok, warning (works, but badly), fails, or absent (optional, and not there). The exit
status is 1 if something fails.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter

from workbench.doctor.installation import check_browser, check_extras, check_packages, check_python
from workbench.doctor.jupyter import check_kernel, check_papermill, check_picture, check_widgets
from workbench.doctor.machine import (
    check_cache,
    check_device,
    check_disk,
    check_memory,
    check_model,
    check_ring,
)
from workbench.doctor.records import FAILS, Settings, examine
from workbench.doctor.training import check_training

CHECKS = (
    ("Python", check_python),
    ("packages", check_packages),
    ("MLX", check_device),
    ("memory", check_memory),
    ("disk", check_disk),
    ("cache", check_cache),
    ("model", check_model),
    ("training", check_training),
    ("pictures", check_picture),
    ("kernel", check_kernel),
    ("papermill", check_papermill),
    ("widgets", check_widgets),
    ("ring", check_ring),
    ("extras", check_extras),
    ("browser", check_browser),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    usual = Settings()
    parser.add_argument("--fetch", action="store_true", help="fetch the built-in model: 98 MB")
    parser.add_argument("--kernel", default=usual.kernel, help="that your notebooks name")
    parser.add_argument(
        "--disk-gb", type=float, default=usual.disk_bytes / 1e9, help="that must be free"
    )
    parser.add_argument(
        "--memory-gb", type=float, default=usual.memory_bytes / 1e9, help="that should be free"
    )


def run(options: argparse.Namespace) -> int:
    """Print a line or more a check; 1 if something fails, else 0."""
    settings = Settings(
        kernel=options.kernel,
        disk_bytes=options.disk_gb * 1e9,
        memory_bytes=options.memory_gb * 1e9,
        fetch=options.fetch,
    )
    started, counts = time.perf_counter(), Counter()
    for record in examine(CHECKS, settings):
        print(record, flush=True)
        counts[record.state] += 1
    seconds = time.perf_counter() - started
    shown = ", ".join(f"{count} {state}" for state, count in counts.items())
    print(f"\n{len(CHECKS)} checks in {seconds:.0f} s: {shown}")
    return 1 if counts[FAILS] else 0
