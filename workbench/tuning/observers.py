"""Whoever wants to know of each step: plain functions of a report, and mlx-lm's callbacks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence

from workbench.errors import ConfigError, ObserverWarning
from workbench.tuning.config import StepReport

Observer = Callable[[StepReport], None]  # or an `mlx_lm.tuner.callbacks.TrainingCallback`
GIGA = 1e9


class Observers:
    """Observers of one training, told of each step when it has been made and recorded.

    An observer that raises is dropped with an `ObserverWarning` that names it, and the training
    goes on: a chart that is lost costs less than a run. To end a run, call `trainer.stop`.

    A callback of mlx-lm (its W&B and SwanLab reporters, or one's own) gets the dictionaries that
    `mlx_lm.tuner.trainer` gives. Their iterations are micro-batches: a step is
    `grad_accum_steps` of them.

    Args:
        members: to begin with; one alone needs no list.
        grad_accum_steps: micro-batches a step.

    Raises:
        ConfigError: one is neither a function nor a callback.
    """

    def __init__(self, members: Iterable[Observer] | Observer = (), grad_accum_steps: int = 1):
        self._members: list[Observer] = []
        self._accum = grad_accum_steps
        self._counted = self._trained_tokens = 0  # reports, and their supervised targets
        alone = callable(members) or _is_callback(members) or not isinstance(members, Iterable)
        for member in [members] if alone else members:
            self.add(member)

    def __len__(self) -> int:
        return len(self._members)

    def add(self, observer: Observer) -> None:
        """Tell one more from the next step on.

        Raises:
            ConfigError: it is neither a function nor a callback.
        """
        if not callable(observer) and not _is_callback(observer):
            raise ConfigError(
                f"an observer must be a function of a StepReport, got {type(observer).__name__}",
                cure="Or give a callback of mlx-lm, which has on_train_loss_report.",
            )
        self._members.append(observer)

    def remove(self, observer: Observer) -> None:
        """Tell it no more; without effect if it was not told."""
        self._members = [member for member in self._members if member is not observer]

    def tell(self, reports: Sequence[StepReport]) -> None:
        """Tell everyone of the newest report.

        Args:
            reports: of all steps that were made; those before are counted, not told again.
        """
        self._trained_tokens += sum(report.num_tokens for report in reports[self._counted :])
        self._counted, report = len(reports), reports[-1]
        for member in list(self._members):
            try:
                if _is_callback(member):
                    self._call_back(member, report)
                else:
                    member(report)
            except Exception as error:
                self.remove(member)
                warnings.warn(
                    f"the observer {_name(member)} failed at step {report.step} and is told no "
                    f"more: {type(error).__name__}: {error}",
                    ObserverWarning,
                    stacklevel=2,
                )

    def _call_back(self, callback: object, report: StepReport) -> None:
        iteration, seconds = report.step * self._accum, report.step_seconds
        callback.on_train_loss_report(
            {
                "iteration": iteration,
                "train_loss": report.loss,
                "learning_rate": report.learning_rate,
                "iterations_per_second": self._accum / seconds,
                "tokens_per_second": report.num_tokens / seconds,
                "trained_tokens": self._trained_tokens,
                "peak_memory": report.peak_bytes / GIGA,
            }
        )
        if report.valid_loss is not None:
            loss, seconds = report.valid_loss, report.valid_seconds
            callback.on_val_loss_report(
                {"iteration": iteration, "val_loss": loss, "val_time": seconds}
            )


def _is_callback(observer: object) -> bool:
    return hasattr(observer, "on_train_loss_report") and hasattr(observer, "on_val_loss_report")


def _name(observer: object) -> str:
    return getattr(observer, "__qualname__", None) or type(observer).__qualname__
