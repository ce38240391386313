"""Where the ranks of one machine meet: free ports, and the file that mx.distributed reads."""

from __future__ import annotations

import contextlib
import json
import socket
from pathlib import Path

from workbench.errors import RankError

LOOPBACK = "127.0.0.1"
LAST_PORT = 65535


def write_hosts(private: Path, num_ranks: int, port: int | None = None) -> Path:
    """A file with an address for each rank of this machine; raises RankError for a bad port."""
    hosts = [[f"{LOOPBACK}:{port}"] for port in find_ports(num_ranks, port)]
    path = private / "hosts.json"
    path.write_text(json.dumps(hosts), encoding="utf-8")
    return path


def find_ports(count: int, first: int | None) -> list[int]:
    """Ports of this machine that are free now: from the one given, or any.

    Raises:
        RankError: one is in use, or none.
    """
    with contextlib.ExitStack() as held:
        taken = []
        for number in range(count):
            port = 0 if first is None else first + number
            try:
                place = held.enter_context(socket.socket())
                place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # only listeners count
                place.bind((LOOPBACK, port))
                place.listen()
            except (OSError, OverflowError) as error:
                reason = getattr(error, "strerror", None) or f"ports end at {LAST_PORT}"
                raise RankError(
                    f"port {port} cannot be used ({reason})",
                    where=LOOPBACK,
                    cure=f"Give a port with {count} free ones from there, or none: free ones are "
                    "found.",
                ) from None
            taken.append(place.getsockname()[1])
    return taken
