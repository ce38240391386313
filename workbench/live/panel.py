"""Training, watched: numbers, charts and buttons in the cell that trains."""

from __future__ import annotations

import asyncio
import contextlib
import time
import weakref
from collections.abc import Iterator, Sequence

from workbench.errors import ConfigError, TrainingError, WorkbenchError, check_whole
from workbench.evaluation.prompts import Prompt
from workbench.live.history import History
from workbench.live.outputs import has_reader, kernel_shell
from workbench.live.pace import Forecast, times_between
from workbench.live.samples import SAMPLES_NAME, Sampler, as_rows, read_samples, samples_html
from workbench.live.tiles import Status
from workbench.live.views import CellView, Face, LineView
from workbench.tuning.trainer import Trainer

BREATH = 0.02  # seconds between two moments in which the notebook's messages are read
TURNS = 5  # of the event loop, until a click that waits has been handled
PAUSE = 0.05  # seconds between two looks at the buttons while paused

_watched: weakref.WeakSet[Trainer] = weakref.WeakSet()


class Watched(list):
    """The reports of one `watch`; as a cell's last value it shows nothing, the panel has."""

    def _ipython_display_(self) -> None:
        pass


class LivePanel:
    """Trains, and shows it: in a notebook with buttons, elsewhere as a picture or as one line.

    The methods that change something set flags only; they take effect between two steps, and may
    be called from any thread.

    Args:
        trainer: what to train; it may have made steps already.
        prompts: questions to ask before the first step and after the last.
        sample_every: steps between two times that they are asked; 0: only then.
        max_new_tokens: of an answer.
        controls: None looks whether there is a browser with widgets; True is sure of it,
            False shows a plain picture.

    Raises:
        ConfigError: a setting is out of range, or there are no widgets to be sure of.
        DataError: a prompt is empty or too long.
        RunError: the run's earlier samples are damaged.
    """

    def __init__(
        self,
        trainer: Trainer,
        prompts: Prompt | Sequence[Prompt] = (),
        sample_every: int = 0,
        max_new_tokens: int = 32,
        controls: bool | None = None,
    ):
        check_whole("sample_every", sample_every, 0)
        if controls not in (None, True, False):
            raise ConfigError(f"controls must be None, True or False, got {controls!r}")
        self.trainer, self._controls = trainer, controls
        self.samples = read_samples(trainer.run.folder) if trainer.run is not None else []
        self.seconds = 0.0  # of training, without pauses
        self._sampler, self._every = Sampler(trainer.base, prompts, max_new_tokens), sample_every
        self._history = History(limit_of=trainer.guard.limit)
        self._forecast, self._view = Forecast(), None
        self._drawn_before = 0.0  # seconds, of earlier calls
        self._paused = self._wants_checkpoint = False
        self._wanted_rate = self._rate_to_show = None
        self._failure: BaseException | None = None
        self._note, self._told = "", ("", "")

    @property
    def draw_seconds(self) -> float:
        """Seconds spent on showing it all."""
        return self._drawn_before + (self._view.draw_seconds if self._view else 0.0)

    @property
    def paused(self) -> bool:
        """Whether training waits for `resume`."""
        return self._paused

    def pause(self) -> None:
        """Wait before the next step."""
        self._paused = True

    def resume(self) -> None:
        """Go on."""
        self._paused = False

    def stop(self) -> None:
        """End `watch` after the step that is being made."""
        self.trainer.stop()

    def checkpoint(self) -> None:
        """Save a checkpoint before the next step."""
        self._wants_checkpoint = True

    def set_learning_rate(self, rate: float) -> None:
        """Go on with another peak learning rate from the next step."""
        self._wanted_rate = rate

    async def watch(self) -> Watched:
        """Train until the end or a stop; returns the reports of the steps that were made.

        A kernel's interrupt is a stop. Calling it again goes on where it stopped.

        Raises:
            TrainingError: a step failed, or another panel watches this trainer.
        """
        if self.trainer in _watched:
            raise TrainingError(
                "another panel is watching this trainer", cure="Stop that one first, or await it."
            )
        first = self.trainer.steps_done
        _watched.add(self.trainer)
        try:
            self._open()
            await self._watch()
        finally:
            _watched.discard(self.trainer)
        return Watched(self.trainer.reports[first:])

    def _open(self) -> None:
        self._failure, self._paused, self._note = None, False, ""
        self._drawn_before, self._view = self.draw_seconds, None
        if self.trainer.finished:
            self._note = "all steps had been made before: there was nothing to do"
        self.trainer.stop_reason = ""  # of an earlier loop
        self._view = self._choose_view()
        self._view.open(self._face())

    def _choose_view(self) -> CellView | LineView:
        shell = kernel_shell()
        if shell is None:
            if self._controls:
                raise ConfigError("controls need a notebook", cure="Leave controls at None.")
            return LineView()
        wanted = has_reader(shell) if self._controls is None else self._controls
        if not wanted or self.trainer.finished:
            return CellView(None)
        from workbench.live.controls import Controls  # widgets only where they can be shown

        actions = {
            "Pause": (self.pause, "Wait before the next step"),
            "Resume": (self.resume, "Go on"),
            "Stop": (self.stop, "End training after this step"),
            "Checkpoint now": (self.checkpoint, "Save a checkpoint before the next step"),
        }
        rate = self.trainer.peak_learning_rate
        return CellView(Controls(actions, self.set_learning_rate, rate), bool(self._controls))

    async def _watch(self) -> None:
        try:
            with self.trainer.session():
                await self._train()
        except (asyncio.CancelledError, KeyboardInterrupt):
            self.trainer.stop("interrupted")
            if kernel_shell() is None:
                raise  # whoever cancelled a program's task waits for it
            asyncio.current_task().uncancel()
        except BaseException as error:
            self._failure = error
            raise
        finally:
            self._view.close(self._face())

    async def _train(self) -> None:
        if self._sampler and not self.trainer.steps_done and not self.samples:
            self.seconds += self._ask()
        breath = 0.0
        while not self.trainer.finished and not self.trainer.stop_reason:
            self._serve()
            if self._paused and not self.trainer.is_stopping:
                self._refresh()
                await asyncio.sleep(PAUSE)
                continue
            started = time.perf_counter()
            known = self._step()
            self._refresh()
            if time.perf_counter() >= breath:
                for _ in range(TURNS):
                    await asyncio.sleep(0)
                breath = time.perf_counter() + BREATH
            whole = time.perf_counter() - started
            self.seconds += whole
            self._forecast.add_around(max(0.0, whole - known))
        self._serve()

    def _step(self) -> float:
        """One step, and what is due after it; returns the seconds that the forecast knows."""
        started = time.perf_counter()
        report = self.trainer.step()
        seconds = time.perf_counter() - started
        self._forecast.add_step(report.step_seconds)
        if report.valid_loss is None:
            known = report.step_seconds
        else:
            known = seconds
            self._forecast.add_extra("validation", seconds - report.step_seconds)
        due = self._every and report.step % self._every == 0
        if self._sampler and (due or self.trainer.finished):
            known += self._ask()
        return known

    def _ask(self) -> float:
        """Ask the prompts; an answer that cannot be had or kept does not end the training."""
        started = time.perf_counter()
        try:
            new = self._sampler.ask(self.trainer.steps_done)
            self.samples += new
            for row in as_rows(new) if self.trainer.run is not None else ():
                self.trainer.run.append(row, SAMPLES_NAME)
        except WorkbenchError as error:
            self._note = f"samples: {error}"
        seconds = time.perf_counter() - started
        self._forecast.add_extra("samples", seconds)
        return seconds

    def _serve(self) -> None:
        """Do what was asked for since the last step."""
        if self._wanted_rate is not None:
            rate, self._wanted_rate = self._wanted_rate, None
            with self._noting("learning rate"):
                if rate != self.trainer.peak_learning_rate:
                    self.trainer.peak_learning_rate = rate
                    self._note = f"peak learning rate {rate:g} from step {self._next_step}"
            self._rate_to_show = self.trainer.peak_learning_rate
        if self._wants_checkpoint:
            self._wants_checkpoint = False
            with self._noting("no checkpoint"):
                self._note = f"checkpoint written to {self.trainer.save_checkpoint()}"

    @property
    def _next_step(self) -> int:
        return self.trainer.steps_done + 1

    @contextlib.contextmanager
    def _noting(self, what: str) -> Iterator[None]:
        try:
            yield
        except (WorkbenchError, OSError) as error:
            self._note = f"{what}: {error}"

    def _refresh(self) -> None:
        told, self._told = self._told, (self._state(), self._note)
        news = told != self._told or self._rate_to_show is not None
        if news or self._view.due:
            self._view.refresh(self._face(), now=news)

    def _state(self) -> str:
        reason = self.trainer.stop_reason
        if self._failure is not None:
            return f"Failed: {self._failure}"
        if self.trainer.finished:
            return "Finished"
        if reason:
            return reason.capitalize() if reason.startswith("stopped") else f"Stopped: {reason}"
        return "Paused" if self._paused else "Training"

    def _face(self) -> Face:
        trainer = self.trainer
        self._history.extend(trainer.reports[len(self._history) :])
        done, total = trainer.steps_done, trainer.total_steps
        every = trainer.config.valid_every
        extras = {
            "validation": times_between(done, total, every) if trainer.data.valid else 0,
            "samples": times_between(done, total, self._every) if self._sampler else 0,
        }
        goes_on = not (trainer.finished or trainer.stop_reason or self._failure)
        remaining = self._forecast.remaining(total - done, extras) if goes_on else None
        status = Status(self._state(), done, total, self.seconds, remaining, self._note)
        shows_samples = bool(self._sampler or self.samples)
        table = samples_html(self.samples) if shows_samples else ""
        rate, self._rate_to_show = self._rate_to_show, None
        return Face(status, self._history, table, rate, self._paused)
