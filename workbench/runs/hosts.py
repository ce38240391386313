"""Where the ranks of one machine meet: free ports, and the file that mx.distributed reads."""

from __future__ import annotations

import json
import random
import socket
from itertools import islice
from pathlib import Path

from workbench.errors import RankError

LOOPBACK = "127.0.0.1"
LAST_PORT = 65535
# Below those that Linux and macOS give to outgoing connections: until a rank comes to bind its
# port, which may take a minute, none of these takes it. Drawn, as two launches may look at once.
DRAWN_PORTS = range(20_000, 32_768)


def write_hosts(private: Path, num_ranks: int, port: int | None = None) -> Path:
    """A file with an address for each rank of this machine; raises RankError for a bad port."""
    hosts = [[f"{LOOPBACK}:{port}"] for port in find_ports(num_ranks, port)]
    path = private / "hosts.json"
    path.write_text(json.dumps(hosts), encoding="utf-8")
    return path


def find_ports(count: int, first: int | None) -> list[int]:
    """Ports of this machine that are free now: from the one given, or drawn.

    Raises:
        RankError: one is in use, or none.
    """
    if first is None:
        drawn = random.SystemRandom().sample(DRAWN_PORTS, len(DRAWN_PORTS))
        ports = list(islice((port for port in drawn if not _refusal(port)), count))
        if len(ports) < count:
            span = f"from {DRAWN_PORTS[0]} to {DRAWN_PORTS[-1]}"
            raise RankError(f"{count} ports cannot be used: {len(ports)} are free {span}")
        return ports
    for port in range(first, first + count):
        if reason := _refusal(port):
            raise RankError(
                f"port {port} cannot be used ({reason})",
                where=LOOPBACK,
                cure=f"Give one with {count} free ports from there, or none: free ones are found.",
            )
    return list(range(first, first + count))


def _refusal(port: int) -> str:
    """Why a port cannot be listened at; "" if it can."""
    try:
        with socket.socket() as place:
            place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # only listeners count
            place.bind((LOOPBACK, port))
            place.listen()
    except (OSError, OverflowError) as error:
        return getattr(error, "strerror", None) or f"ports end at {LAST_PORT}"
    return ""
