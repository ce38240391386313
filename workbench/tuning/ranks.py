"""Processes that train one model together: data-parallel over the ring of mx.distributed.

Every rank knows all rows of a step and computes its share of them; sums of losses and gradients
are added up over the ranks, then divided once by the step's supervised targets. So ragged shares
weigh as they do in one process.

The ring has no authentication and no encryption: whoever reaches its ports can take part. Use it
on one machine (127.0.0.1), or in a network that you trust.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path

from workbench.blocks import grouped, joined, parted
from workbench.data.batches import Batch
from workbench.data.shares import share_of
from workbench.errors import RankError
from workbench.runs.beats import CALLING, LOST, WAITING, WORKING, BeatFile, follow_launcher

RANK_VARIABLE, HOSTS_VARIABLE = "MLX_RANK", "MLX_HOSTFILE"  # as mlx.launch sets them
MESSAGE_BYTES = 1 << 26  # that are joined into one message, at most
SLOT_BYTES = 1024  # of a rank in a small message; longer ones need two
LENGTH_BYTES = 8
MOST_BYTES = 1 << 28  # of what a rank tells the others
FIELDS = 2  # of what is told: at which point, and what


class Ranks:
    """This process among those that train together; by itself, it is alone and costs nothing.

    What is said of `gather`, `add_up` and `broadcast`: every rank must call it, in the same order.

    Args:
        rank: of this process, from 0.
        size: number of ranks.
        group: of mx.distributed; None if alone.
        beats: told when this rank waits for the others.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        group: mx.distributed.Group | None = None,
        beats: BeatFile | None = None,
    ):
        self.rank, self.size, self._group, self._beats = rank, size, group, beats

    def __repr__(self) -> str:
        return f"rank {self.rank} of {self.size}"

    @property
    def alone(self) -> bool:
        """Whether there is no other rank."""
        return self.size == 1

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which alone writes files."""
        return self.rank == 0

    def share(self, batches: Sequence[Batch]) -> tuple[list[Batch], bool]:
        """What this rank computes of a step's micro-batches, and whether that counts.

        A rank that gets no row computes another's, so that it has the same sums to add: nought.
        """
        mine = share_of(batches, self.rank, self.size)
        return mine or list(batches[:1]), bool(mine)

    def add_up(self, tree: object, counts: bool = True) -> object:
        """The sum over all ranks of each array in a tree.

        Args:
            tree: of the same structure, shapes and dtypes on every rank.
            counts: whether this rank's are added; else they are taken as nought.
        """
        if self.alone:
            return tree

        def total(block: mx.array) -> mx.array:
            return self._all_sum(block if counts else mx.zeros_like(block))

        return _by_block(tree, total)

    def broadcast(self, tree: object) -> object:
        """Rank 0's arrays, to the bit, in place of those of a tree of the same structure."""
        if self.alone:
            return tree

        def of_first(block: mx.array) -> mx.array:
            raw = block.reshape(-1).view(mx.uint8)  # adding to a float would turn -0.0 into 0.0
            raw = self._all_sum(raw if self.is_first else mx.zeros_like(raw))
            return raw.view(block.dtype).reshape(block.shape)

        return _by_block(tree, of_first)

    def gather(self, point: str, value: object) -> list[object]:
        """What each rank has to say, as JSON, by rank.

        Args:
            point: where in the program this is; ranks that are elsewhere are noticed.
            value: this rank's.

        Raises:
            RankError: the ranks are not at the same point, or one says too much.
        """
        if self.alone:
            return [value]
        said = [_read(row) for row in self._exchange(json.dumps([point, value]).encode())]
        if None in said:
            raise self._lost("the ranks do not do the same: one sent what is no message")
        if any(there != point for there, _ in said):
            places = [
                f"rank {rank} is at {there!r}{f' ({what})' if isinstance(what, str) else ''}"
                for rank, (there, what) in enumerate(said)
            ]
            raise self._lost(f"the ranks do not do the same: {'; '.join(places)}")
        return [value for _, value in said]

    def tell(self, point: str, failure: str) -> None:
        """Have the others know at a point that this rank has failed, if they still listen."""
        with contextlib.suppress(RankError):
            self.gather(point, failure)
        self._beat(WORKING)  # it was not the others

    @contextlib.contextmanager
    def together(self, point: str) -> Iterator[None]:
        """Do something on every rank, or on some; if it fails on one, it fails on all.

        Raises:
            RankError: another rank failed; names it, and its error.
        """
        if self.alone:
            yield
            return
        try:
            yield
        except BaseException as error:
            self.tell(point, f"{type(error).__name__}: {error}")
            raise
        for rank, failure in enumerate(self.gather(point, None)):
            if failure:
                raise RankError(f"rank {rank} failed at {point}: {failure}")

    def _exchange(self, text: bytes) -> list[bytes]:
        """Each rank's bytes; those that are short need one message."""
        if len(text) > MOST_BYTES:
            raise RankError(f"{self} has {len(text)} bytes to tell, {MOST_BYTES} are allowed")
        head = SLOT_BYTES - LENGTH_BYTES
        starts = self._rows(len(text).to_bytes(LENGTH_BYTES, "little") + text[:head], SLOT_BYTES)
        lengths = [int.from_bytes(row[:LENGTH_BYTES].tobytes(), "little") for row in starts]
        longest = max(lengths) - head
        if longest > MOST_BYTES:
            raise self._lost("the ranks do not do the same: a message of one is none")
        rests = self._rows(text[head:], longest) if longest > 0 else starts[:, :0]
        whole = np.concatenate([starts[:, LENGTH_BYTES:], rests], axis=1)
        return [row[:length].tobytes() for row, length in zip(whole, lengths)]

    def _rows(self, text: bytes, width: int) -> np.ndarray:
        """(size, width) uint8: the bytes of every rank."""
        table = np.zeros((self.size, width), dtype=np.uint8)
        table[self.rank, : len(text)] = np.frombuffer(text, dtype=np.uint8)
        return np.array(self._all_sum(mx.array(table)))

    def _all_sum(self, block: mx.array) -> mx.array:
        mx.eval(block)  # what is computed is no waiting
        self._beat(WAITING)
        try:
            total = mx.distributed.all_sum(block, group=self._group, stream=mx.cpu)
            mx.eval(total)
        except RuntimeError as error:
            raise self._lost(
                f"{self} has lost the others ({error})",
                cure="Look at what the others wrote; start all again: a run goes on from its "
                "newest checkpoint.",
            ) from None
        self._beat(WORKING)
        return total

    def _lost(self, what: str, cure: str = "") -> RankError:
        """The error of a rank that others have left: the supervisor looks for the cause there."""
        self._beat(LOST)
        return RankError(what, cure=cure)

    def _beat(self, state: int) -> None:
        if self._beats:
            self._beats.write(state)


ALONE = Ranks()
_joined: list[Ranks] = []


def join_ranks(timeout: float = 600.0) -> Ranks:
    """This process's place among those that were started together; alone if it was started alone.

    Reads MLX_RANK and MLX_HOSTFILE, as `python -m workbench launch` and `mlx.launch` set them. On
    several machines start each rank by hand, or by `mlx.launch --hostfile`: the file is
    `[["10.0.0.1:5000"], ["10.0.0.2:5000"]]`, the address of each rank in their order. There is no
    authentication: only in a network that you trust.

    The first call waits until all ranks have come; later calls return the same.

    Args:
        timeout: seconds; the process is ended if the others have not come by then (MLX cannot be
            interrupted there).

    Raises:
        RankError: the two variables are not what they should be, or the ring cannot be formed.
    """
    if not _joined:
        rank, size = _place(os.environ)
        _joined.append(Ranks() if size == 1 else _join(rank, size, timeout))
    return _joined[0]


def _join(rank: int, size: int, timeout: float) -> Ranks:
    beats = follow_launcher(rank)
    if beats:
        beats.write(CALLING)
    faulthandler.dump_traceback_later(timeout, exit=True, file=sys.__stderr__)
    try:
        group = mx.distributed.init(strict=True, backend="ring")
    except RuntimeError as error:
        raise RankError(
            f"rank {rank} of {size} found no ring ({error})",
            where=os.environ[HOSTS_VARIABLE],
            cure="Are all ranks started, and the ports free?",
        ) from None
    finally:
        faulthandler.cancel_dump_traceback_later()
    if beats:
        beats.write(WORKING)
    return Ranks(group.rank(), group.size(), group, beats)


def _place(environment: Mapping[str, str]) -> tuple[int, int]:
    """Rank and number of ranks; 0 and 1 where nobody says anything."""
    path = environment.get(HOSTS_VARIABLE)
    if not path:
        return 0, 1
    try:
        hosts = json.loads(Path(path).read_text(encoding="utf-8") or "[[]]")  # one host's is empty
    except (OSError, ValueError) as error:
        raise RankError(f"cannot be read ({error})", where=f"{HOSTS_VARIABLE} {path}") from None
    if not isinstance(hosts, list) or not hosts:
        what = 'is no list of addresses such as [["10.0.0.1:5000"], ["10.0.0.2:5000"]]'
        raise RankError(what, where=f"{HOSTS_VARIABLE} {path}")
    rank = environment.get(RANK_VARIABLE, "0" if len(hosts) == 1 else "")
    if not rank.isdecimal() or int(rank) >= len(hosts):
        raise RankError(
            f"is {rank!r}; the {len(hosts)} hosts of {path} have ranks 0 to {len(hosts) - 1}",
            where=RANK_VARIABLE,
        )
    return int(rank), len(hosts)


def _by_block(tree: object, change: object) -> object:
    """The tree with its arrays changed, many of one dtype at a time."""
    named = sorted(tree_flatten(tree), key=lambda pair: pair[0])  # alike on every rank
    new: dict[str, mx.array] = {}
    kinds = grouped(named, lambda pair: pair[1].dtype, lambda pair: pair[1].nbytes, MESSAGE_BYTES)
    for group in kinds:
        names, arrays = zip(*group)
        block = change(joined(arrays))
        new |= dict(zip(names, parted(block, [array.shape for array in arrays])))
    return tree_map_with_path(lambda path, _: new[path], tree)


def _read(text: bytes) -> list | None:
    """What a rank said: at which point, and what; None if that is no message."""
    with contextlib.suppress(ValueError):
        said = json.loads(text)
        if isinstance(said, list) and len(said) == FIELDS:
            return said
    return None
