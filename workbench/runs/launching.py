"""Start the ranks of one training on this machine, watch them, and leave none behind.

`mlx.launch` ends with status 0 when a rank has died, and a ring that cannot be formed waits for
ever. This supervisor has limits of time, names the rank that is at fault, and ends the others.

The ranks talk over 127.0.0.1 without authentication: every user of this machine could take part.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from workbench.backend import usable_cores
from workbench.errors import RankError, check_number, check_whole
from workbench.runs.beats import CALLING, LAUNCH_VARIABLE, LOST, WAITING, Beat, read_beat
from workbench.runs.hosts import write_hosts

THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
POLL_SECONDS = 0.1
GRACE_SECONDS = 3.0  # between a polite end and a hard one
LEAVE_SECONDS = 60.0  # for the last step and its checkpoint, after Ctrl-C
SETTLE_SECONDS = 1.0  # for others to end, when one has failed
LONELY_SECONDS = 10.0  # that a rank waits for one that has ended, or for the end of one it has lost
SHOWN_LINES, SHOWN_BYTES = 20, 8192  # of a log, in an error


@dataclass(frozen=True)
class Limits:
    """How long ranks may take, and where they meet."""

    start_timeout: float = 300.0  # seconds until all have joined; 0: no limit
    silence: float = 1800.0  # seconds that a rank may wait for another; 0: no limit
    port: int | None = None  # of rank 0, the others have the next ones; None: free ones

    def __post_init__(self):
        check_number("start_timeout", self.start_timeout, 0)
        check_number("silence", self.silence, 0)
        if self.port is not None:
            check_whole("port", self.port, 1)


@dataclass
class _Rank:
    """A rank's process, as the supervisor sees it."""

    number: int
    process: subprocess.Popen
    log: Path
    beat: Beat | None = None
    joined: psutil.Process | None = None  # that gave it: a kernel, where a notebook runs
    ended_at: float | None = None  # seconds of the monotonic clock


def run_ranks(
    command: Callable[[int], Sequence[str]],
    num_ranks: int,
    logs: str | os.PathLike,
    limits: Limits | None = None,
) -> list[Path]:
    """Run a command as so many ranks, to the end of all of them; returns their logs.

    Ctrl-C lets the ranks finish their step and write a checkpoint; a second one ends them at once.

    Args:
        command: gives the command of a rank, counted from 0; it calls `wb.join_ranks()`.
        num_ranks: processes.
        logs: folder for what each rank prints, `rank-0.log` and so on; made if needed.
        limits: of time, and the port.

    Raises:
        RankError: a rank failed, did not come or was silent, or a port is in use; with the end of
            its log. `status` is the rank's exit status, 128 + the signal if one killed it.
        KeyboardInterrupt: after Ctrl-C, when all have ended.
    """
    check_whole("num_ranks", num_ranks, 1)
    limits, logs = limits or Limits(), Path(logs)
    with tempfile.TemporaryDirectory(prefix="workbench-ranks-") as folder:
        private, ranks = Path(folder), []
        hosts = write_hosts(private, num_ranks, limits.port)
        try:
            logs.mkdir(parents=True, exist_ok=True)
            for number in range(num_ranks):
                environment = rank_environment(number, num_ranks, hosts)
                ranks.append(_start(number, command(number), logs, environment))
            _watch(ranks, private, limits)
        except OSError as error:
            raise RankError(f"cannot be started or written ({error})", where=logs) from None
        except KeyboardInterrupt:
            _ask_to_stop(ranks, private)
            raise
        finally:
            _end(ranks, private)
        return [rank.log for rank in ranks]


def rank_environment(rank: int, num_ranks: int, hosts: Path) -> dict[str, str]:
    """The environment of a rank on this machine: its place, and its share of the cores.

    The rank ends itself when this process, or the folder of the hosts file, is gone.
    """
    threads = dict.fromkeys(THREADS, str(threads_of_rank(num_ranks)))
    place = {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts), "PYTHONUNBUFFERED": "1"}
    place[LAUNCH_VARIABLE] = f"{os.getpid()}:{hosts.parent}"
    return {**os.environ, **threads, **place}


def threads_of_rank(num_ranks: int) -> int:
    """BLAS threads of each of so many ranks: its share of this machine's cores."""
    return max(1, usable_cores() // num_ranks)


def _start(number: int, command: Sequence[str], logs: Path, environment: dict[str, str]) -> _Rank:
    log = logs / f"rank-{number}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the supervisor, which tells rank 0
        )
    return _Rank(number, process, log)


def _watch(ranks: Sequence[_Rank], private: Path, limits: Limits) -> None:
    """Return when all have ended well; raise RankError as soon as one has not."""
    started = time.monotonic()
    while True:
        running = _look(ranks, private)
        if not running:
            return
        absent = [rank for rank in running if rank.beat is None or rank.beat.state == CALLING]
        if limits.start_timeout and time.monotonic() - started > limits.start_timeout and absent:
            raise _not_formed(ranks, limits)
        _require_progress(ranks, limits)
        time.sleep(POLL_SECONDS)


def _look(ranks: Sequence[_Rank], private: Path) -> list[_Rank]:
    """Those that still run; raises RankError if one has failed."""
    running = _running(ranks, private)
    if any(rank.process.returncode for rank in ranks):
        until = time.monotonic() + LONELY_SECONDS
        while running and not _cause(ranks) and time.monotonic() < until:
            time.sleep(POLL_SECONDS)
            running = _running(ranks, private)
        first = _cause(ranks) or next(rank for rank in ranks if rank.process.returncode)
        raise _failure(first, _gone_in_order(ranks))
    return running


def _running(ranks: Sequence[_Rank], private: Path) -> list[_Rank]:
    """Those that still run; reads the signs of life of all."""
    for rank in ranks:
        if rank.process.poll() is not None:
            rank.ended_at = rank.ended_at or time.monotonic()
        _read_sign(rank, private)
    return [rank for rank in ranks if rank.process.returncode is None]


def _read_sign(rank: _Rank, private: Path) -> None:
    """Take in a rank's last sign of life."""
    rank.beat = read_beat(private, rank.number) or rank.beat
    if rank.beat and (rank.joined is None or rank.joined.pid != rank.beat.pid):
        with contextlib.suppress(psutil.Error):
            rank.joined = psutil.Process(rank.beat.pid)


def _cause(ranks: Sequence[_Rank]) -> _Rank | None:
    """Who failed first: one that was killed, or that did not fail because others were gone."""
    failed = [rank for rank in ranks if rank.process.returncode]
    causes = [
        rank
        for rank in failed
        if rank.process.returncode < 0 or not (rank.beat and rank.beat.state == LOST)
    ]
    return min(causes, key=lambda rank: (rank.process.returncode > 0, rank.number), default=None)


def _gone_in_order(ranks: Sequence[_Rank]) -> list[_Rank]:
    """Those that have ended well, or are about to: a failure of the rest may be their doing."""
    until = time.monotonic() + SETTLE_SECONDS
    for rank in ranks:
        with contextlib.suppress(subprocess.TimeoutExpired):
            rank.process.wait(max(0, until - time.monotonic()))
    return [rank for rank in ranks if rank.process.returncode == 0]


def _failure(rank: _Rank, gone: Sequence[_Rank]) -> RankError:
    """The error of a rank, which names those that have gone before."""
    code = rank.process.returncode
    how = f"ended with status {code}"
    if code < 0:
        how = f"was killed by {signal.Signals(-code).name}"
    before = "".join(f", when rank {other.number} had ended with status 0" for other in gone)
    what = f"rank {rank.number} {how}{before}; the others were ended{_last_lines(rank.log)}"
    error = RankError(what)
    error.status = 128 - code if code < 0 else code
    return error


def _not_formed(ranks: Sequence[_Rank], limits: Limits) -> RankError:
    what = f"after {limits.start_timeout:g} s the ranks have not joined"
    missing = [rank for rank in ranks if rank.beat is None]
    if missing:
        names = ", ".join(f"rank {rank.number}" for rank in missing)
        what = f"{names} did not come to wb.join_ranks() within {limits.start_timeout:g} s"
    log = (missing or ranks)[0].log
    return RankError(
        f"{what}{_last_lines(log)}",
        cure="" if missing else "Something else may have connected to their ports: try again.",
    )


def _require_progress(ranks: Sequence[_Rank], limits: Limits) -> None:
    """Raise RankError if one waits too long for the others."""
    now = time.monotonic()
    waiting = [rank for rank in ranks if rank.beat and rank.beat.state == WAITING]
    waiting = [rank for rank in waiting if rank.ended_at is None]
    gone = [rank for rank in ranks if rank.ended_at is not None]
    for rank in waiting:
        seconds = now - rank.beat.since
        if limits.silence and seconds > limits.silence:
            late = [other for other in ranks if other not in waiting] or [rank]
            names = ", ".join(f"rank {other.number}" for other in late if other is not rank)
            raise RankError(
                f"rank {rank.number} has waited {seconds:.0f} s for {names or 'an answer'}"
                f"{_last_lines(late[0].log)}",
                cure="If such a pause is meant, give a larger silence.",
            )
        if gone and now - max(other.ended_at for other in gone) > LONELY_SECONDS < seconds:
            raise RankError(
                f"rank {rank.number} waits for rank {gone[0].number}, which has ended"
                f"{_last_lines(gone[0].log)}",
                cure="Every rank must make the same steps.",
            )


def _last_lines(log: Path) -> str:
    """The end of a log, for a message; what is not printable is left out."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - SHOWN_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    lines = [line for line in text.splitlines() if line.strip()][-SHOWN_LINES:]
    shown = ["".join(c if c.isprintable() else " " for c in line) for line in lines]
    return "\n".join([f"; the end of {log}:", *shown]) if shown else f"; {log} is empty"


def _ask_to_stop(ranks: Sequence[_Rank], private: Path) -> None:
    """Interrupt rank 0, which tells the others; wait for the end of their step."""
    if ranks:
        _running(ranks, private)
        beat = ranks[0].beat
        with contextlib.suppress(OSError):
            os.kill(beat.pid if beat else ranks[0].process.pid, signal.SIGINT)
        until = time.monotonic() + LEAVE_SECONDS
        while (running := _running(ranks, private)) and time.monotonic() < until:
            if len(running) < len(ranks):  # the first has ended, by now the others know
                until = min(until, min(rank.ended_at or until for rank in ranks) + LONELY_SECONDS)
            time.sleep(POLL_SECONDS)


def _end(ranks: Sequence[_Rank], private: Path) -> None:
    """End every process that a rank has started, politely first."""
    processes = {process.pid: process for rank in ranks for process in _family(rank, private)}
    for process in processes.values():
        with contextlib.suppress(psutil.Error):
            process.terminate()
    _, alive = psutil.wait_procs(processes.values(), timeout=GRACE_SECONDS)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=GRACE_SECONDS)
    for rank in ranks:
        rank.process.wait()


def _family(rank: _Rank, private: Path) -> Iterator[psutil.Process]:
    """A rank's process, what it started, and the kernel that joined, if it was left behind."""
    _read_sign(rank, private)
    if rank.process.poll() is None:
        with contextlib.suppress(psutil.Error):
            yield (process := psutil.Process(rank.process.pid))
            yield from process.children(recursive=True)
    if rank.joined:
        yield rank.joined
