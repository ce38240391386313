"""Where the time of a step goes, and how far it is from what the matrix products alone take."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import html
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import pandas as pd
from mlx.utils import tree_map

from workbench.backend import measure_matmul
from workbench.data.batches import Batch
from workbench.errors import ConfigError, check_whole
from workbench.probes.memory import cache_limit
from workbench.tuning.flops import step_flops
from workbench.tuning.gradients import clip_by_global_norm
from workbench.tuning.losses import LossFunction, mean_loss
from workbench.tuning.objectives import terms_of
from workbench.tuning.prefix_cache import PrefixLoss
from workbench.tuning.refusals import require_finite
from workbench.tuning.trainer import Trainer
from workbench.tuning.update import accumulate, apply_update, step_seed

PHASES = {  # and what each holds
    "data": "rows become padded batches",
    "forward": "embedding and layers",
    "loss": "head and cross-entropy",
    "backward": "gradients of both",
    "update": "clipping, optimizer, checks for NaN",
    "evaluation": "validation, shared out over the steps",
    "host": "building the graph, kept states, what is left",
}
MILLI, GIGA = 1e-3, 1e9


@dataclass(frozen=True, repr=False)
class StepProfile:
    """Seconds of a training step by phase, and the share of the matmul peak that it reaches."""

    subject: str  # the model, and what is special about the run
    seconds: dict[str, float]  # phase: median over the steps
    steps: int  # that were measured
    losses: tuple[float, ...]  # of these steps, mean over the supervised targets
    flops: int | None  # of the matrix products of a step (median); None: not known
    peak_gflops: float  # float32 matrix product, measured beside
    notes: tuple[str, ...] = ()

    @property
    def step_seconds(self) -> float:
        """The whole step, without its share of the validations."""
        return sum(self.seconds.values()) - self.seconds["evaluation"]

    @property
    def share(self) -> dict[str, float]:
        """Each phase's share of all the seconds; they add up to 1."""
        whole = sum(self.seconds.values())
        return {phase: seconds / whole for phase, seconds in self.seconds.items()}

    @property
    def floor_seconds(self) -> float | None:
        """What the step's matrix products would take at the measured peak."""
        return None if self.flops is None else self.flops / (self.peak_gflops * GIGA)

    @property
    def peak_share(self) -> float | None:
        """Floor over step: model FLOP utilisation (Chowdhery et al. 2022, PaLM, appendix B)."""
        return None if self.flops is None else self.floor_seconds / self.step_seconds

    @property
    def summary(self) -> str:
        """One line: the step, and how near it is to the floor."""
        text = f"{self.subject}: {self.step_seconds / MILLI:.1f} ms a step"
        if self.flops is None:
            return text
        return (
            f"{text}, {100 * self.peak_share:.0f} % of the {self.peak_gflops:.0f} GFLOP/s that a "
            f"float32 matrix product reaches here; floor {self.floor_seconds / MILLI:.1f} ms "
            f"({self.flops / GIGA:.3g} GFLOP)"
        )

    def table(self) -> pd.DataFrame:
        """One row a phase: milliseconds, share in percent, what it holds."""
        return pd.DataFrame(
            {
                "phase": list(self.seconds),
                "time (ms)": [seconds / MILLI for seconds in self.seconds.values()],
                "share (%)": [100 * share for share in self.share.values()],
                "what": [PHASES[phase] for phase in self.seconds],
            }
        )

    def __str__(self) -> str:
        lines = [
            f"{phase:<10}  {seconds / MILLI:>9.2f} ms  {100 * self.share[phase]:>5.1f} %  "
            f"{PHASES[phase]}"
            for phase, seconds in self.seconds.items()
        ]
        return "\n".join([self.summary, *lines, *(f"note: {note}" for note in self.notes)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head = "".join(f"<th style='text-align:left'>{name}</th>" for name in self.table())
        rows = "".join(
            f"<tr><td style='text-align:left'>{phase}</td><td>{seconds / MILLI:.2f}</td>"
            f"<td>{100 * self.share[phase]:.1f}</td>"
            f"<td style='text-align:left'>{html.escape(PHASES[phase])}</td></tr>"
            for phase, seconds in self.seconds.items()
        )
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        return (
            f"<p><b>{html.escape(self.summary)}</b></p>"
            f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>{notes}"
        )


def profile_step(trainer: Trainer, steps: int = 3) -> StepProfile:
    """Make the trainer's next steps, phase by phase, and take them back.

    Each phase is evaluated at its end, so that its time is its own; a first step warms up and is
    not counted. Afterwards weights, optimizer, random state, reports and run folder are as before;
    only MLX's peak memory and the prefix cache know of it. The rows may be beyond the last step.

    Args:
        trainer: as it would train; an adapter attached, on the main thread.
        steps: that are measured.

    Raises:
        TrainingError: a step fails, as it would in training.
    """
    check_whole("steps", steps, 1)
    first = trainer.steps_done
    with cache_limit(trainer.cache_limit_bytes):
        with _taken_back(trainer):
            _timed_step(trainer, first)
        with _taken_back(trainer):
            made = [_timed_step(trainer, first + number) for number in range(steps)]
        with _taken_back(trainer):
            evaluation = _evaluation_seconds(trainer, steps)
    measured = [watch.seconds for watch, *_ in made]
    seconds = {phase: statistics.median(each[phase] for each in measured) for phase in PHASES}
    seconds["evaluation"] = evaluation
    notes, flops = [], None
    if not callable(getattr(trainer.model, "backbone", None)):
        notes.append("the model does not part into backbone and head: forward holds the loss, too")
    try:
        how = trainer.prefix.first_layer, trainer.prompt_sharing.used
        counts = [step_flops(trainer.model, batches, *how) for _, batches, _ in made]
        flops = round(statistics.median(counts))
    except ConfigError as error:
        notes.append(f"no share of the peak: {error.what}")
    kept = f", {trainer.prefix}" if trainer.prefix.used else ""
    losses = tuple(loss for *_, loss in made)
    subject = f"{trainer.base.name}{kept}"
    return StepProfile(subject, seconds, steps, losses, flops, measure_matmul(), tuple(notes))


class _Stopwatch:
    """Seconds by phase: each lap gives the time since the last one to a phase."""

    def __init__(self):
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._last = time.perf_counter()
        self._before_loss = "host"

    def lap(self, phase: str, *arrays: object) -> None:
        """Evaluate what the phase made; the time since the last lap was the phase's."""
        mx.eval(*arrays)
        now = time.perf_counter()
        self.seconds[phase] += now - self._last
        self._last = now

    def listening(self, loss_fn: LossFunction) -> LossFunction:
        """The same loss function, with a lap before it, after the backbone and at its end."""
        parts = self._in_parts(loss_fn)
        if isinstance(loss_fn, PrefixLoss):  # which knows the model by itself
            parts = dataclasses.replace(loss_fn, loss_fn=self._in_parts(loss_fn.loss_fn))

        def listens(model: nn.Module, batch: Batch) -> mx.array:
            self.lap(self._before_loss)
            self._before_loss = "backward"  # of the micro-batch before
            return parts(model, batch)

        return listens

    def _in_parts(self, loss_fn: LossFunction) -> LossFunction:
        def in_parts(model: nn.Module, batch: Batch) -> mx.array:
            self.lap("host")
            splits = callable(getattr(model, "backbone", None))
            loss = loss_fn(self._watched(model) if splits else model, batch)
            self.lap("loss" if splits else "forward", loss)
            return loss

        return in_parts

    def _watched(self, model: nn.Module) -> nn.Module:
        watched = copy.copy(model)  # the same modules, by the same names
        for name in ("backbone", "states_at"):
            if callable(getattr(model, name, None)):
                setattr(watched, name, self._forward(getattr(model, name)))
        return watched

    def _forward(self, run: Callable[..., mx.array]) -> Callable[..., mx.array]:
        def runs(*args, **kwargs) -> mx.array:
            hidden_states = run(*args, **kwargs)
            self.lap("host")
            self.lap("forward", hidden_states)
            return hidden_states

        return runs


def _timed_step(trainer: Trainer, step: int) -> tuple[_Stopwatch, list[Batch], float]:
    """One update as the trainer makes it; returns its times, its batches and its loss."""
    watch, config = _Stopwatch(), trainer.config
    batches = trainer.feed.batches(step)
    weight = sum(batch.weight for batch in batches)
    watch.lap("data")
    loss_fn, seed = watch.listening(terms_of(trainer)[0].loss_fn), step_seed(config.seed, step)
    again = config.grad_checkpoint
    loss_sum, gradients = accumulate(trainer.model, loss_fn, batches, seed, again)
    watch.lap("backward")
    loss = loss_sum / weight
    clipped, norm = clip_by_global_norm(gradients, config.max_grad_norm, weight)
    places = [place for batch in batches for place in batch.places]
    require_finite(loss, norm, gradients, step + 1, places)
    del gradients  # clipping writes over arrays that nobody else holds
    rate = trainer.learning_rate(min(step, trainer.total_steps - 1))
    apply_update(trainer.model, trainer.optimizer, clipped, loss, rate, step + 1)
    watch.lap("update")
    return watch, batches, loss.item()


def _evaluation_seconds(trainer: Trainer, count: int) -> float:
    """Seconds of validation that fall to a step: some batches stand for all, by their tokens."""
    rows, size = sorted(trainer.data.valid, key=len), trainer.config.micro_batch_size
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    if not parts:
        return 0.0
    chosen = parts[:: -(-len(parts) // count)]

    def tokens(batches: list) -> int:
        return sum(len(part) * len(part[-1]) for part in batches)

    seconds = 0.0
    for counts in (False, True):  # the first pass warms up
        for part in chosen:
            started = time.perf_counter()
            mean_loss(trainer.model, part, size, trainer.loss_fn)
            seconds += counts * (time.perf_counter() - started)
    every, total = trainer.config.valid_every or trainer.total_steps, trainer.total_steps
    return seconds * tokens(parts) / tokens(chosen) * -(-total // every) / total


@contextlib.contextmanager
def _taken_back(trainer: Trainer) -> Iterator[None]:
    """Whatever happens within: weights, optimizer, mode, random state, data are as before."""
    model, optimizer, mark = trainer.model, trainer.optimizer, trainer.feed.mark()
    weights, state = model.trainable_parameters(), tree_map(lambda x: x, optimizer.state)
    (key,), mode = mx.random.state, model.training
    high, low = key.tolist()
    try:
        yield
    finally:
        model.update(weights)
        optimizer.state = state
        model.train(mode)
        mx.random.seed((high << 32) | low)
        trainer.feed.go_back(mark)
