"""How a panel looks where it runs: widgets, plain outputs of a cell, or one line."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

from tqdm import tqdm

from workbench.live.history import History
from workbench.live.outputs import HTML, TEXT, Slot, visible
from workbench.live.pace import Pace
from workbench.live.run_chart import QUICK, SMALL, RunChart
from workbench.live.tiles import Status, heading_html

NUMBERS_SECONDS, PICTURE_SECONDS = 0.5, 1.0  # between two refreshes, with a person before it
RARE_SECONDS = 10.0  # without
NUMBERS_SHARE, PICTURE_SHARE = 0.005, 0.015  # of the time, for all refreshes
PATIENCE, LOOKS = 10.0, 4  # seconds, and refreshes, until a browser with widgets has answered
TINY = 1e-9  # seconds: tqdm shows nothing before the first `refresh`
LINE = "|{bar:24}| {desc}"  # tqdm's own time left knows no validations


@dataclass(frozen=True)
class Face:
    """All that a panel shows."""

    status: Status
    history: History
    samples: str  # an HTML table, or nothing
    rate: float | None = None  # goes into the field of the learning rate, once
    paused: bool = False


class CellView:
    """A notebook's cell: numbers, picture and samples, each an output updated in place.

    Args:
        controls: widgets that show them (`Controls`), or None for plain outputs.
        certain: whether the widgets are known to be shown; else a browser must answer.
    """

    _retired = None  # the widgets of the panel before, see `Controls.retire`

    def __init__(self, controls: object | None, certain: bool = False):
        self._controls, self._certain = controls, certain
        self._slots = (Slot(), Slot(), Slot())
        self._chart, self._drawn, self._table, self._looks = RunChart(), -1, "", 0
        self._before = 0.0  # seconds spent on widgets that nobody saw
        self._set_pace()

    def _set_pace(self) -> None:
        quick = self._controls is not None
        self._numbers = Pace(NUMBERS_SECONDS if quick else RARE_SECONDS, NUMBERS_SHARE)
        self._picture = Pace(PICTURE_SECONDS if quick else RARE_SECONDS, PICTURE_SHARE)

    @property
    def draw_seconds(self) -> float:
        """Seconds spent on refreshing in all."""
        return self._before + self._numbers.seconds + self._picture.seconds

    @property
    def due(self) -> bool:
        """Whether it is time for a refresh."""
        return self._numbers.due or self._picture.due

    def open(self, face: Face) -> None:
        """Show the first state."""
        if CellView._retired is not None:
            CellView._retired.close()
            CellView._retired = None
        if self._controls is not None:
            with self._numbers.spending():
                bundles = self._controls.bundles()
                for slot, bundle in zip(self._slots, bundles if face.samples else bundles[:2]):
                    slot.show(bundle)
        self._opened = time.perf_counter()
        self.refresh(face, now=True)

    def refresh(self, face: Face, now: bool = False) -> None:
        """Show what has changed, as often as it may cost; the numbers at once if `now`."""
        self._look_for_browser()
        if now or self._numbers.due:
            with self._numbers.spending():
                self._show_numbers(face)
        at_once = now and face.paused  # it costs no training time, and will stand for a while
        if (at_once or self._picture.due) and len(face.history) != self._drawn:
            with self._picture.spending():
                self._show_picture(face, self._draw(face, QUICK))

    def close(self, face: Face) -> None:
        """Show the final state as plain outputs, which a saved notebook keeps."""
        with self._picture.spending():
            png = self._draw(face, SMALL)
            for _ in range(2 if self._controls is not None else 1):
                self._table = ""  # is due on either surface
                self._show_numbers(face)
                self._show_picture(face, png)
                if self._controls is not None:
                    self._controls.retire()
                    CellView._retired, self._controls = self._controls, None

    def _look_for_browser(self) -> None:
        """Without an answer from widgets, change to plain outputs."""
        if self._controls is None or self._certain:
            return
        self._certain = self._controls.alive
        self._looks += 1  # between two of them the kernel has read its messages
        patient = self._looks < LOOKS or time.perf_counter() < self._opened + PATIENCE
        if self._certain or patient:
            return
        self._before = self.draw_seconds
        self._controls.retire()
        self._controls.close()
        self._controls, self._drawn, self._table = None, -1, ""
        self._set_pace()

    def _draw(self, face: Face, compression: int) -> bytes:
        self._drawn = len(face.history)
        self._chart.update(face.history)
        return self._chart.png(compression)

    def _show_numbers(self, face: Face) -> None:
        heading = heading_html(face.status, face.history)
        if self._controls is not None:
            self._controls.show_numbers(heading, face.rate, face.paused)
        else:
            self._slots[0].show({HTML: heading, TEXT: visible(str(face.status))})
        if face.samples != self._table and self._slots[1].shown:  # they stand below the picture
            self._table = face.samples
            self._show_samples(face.samples)

    def _show_samples(self, table: str) -> None:
        if self._controls is not None:
            self._controls.show_samples(table)
        else:
            self._slots[2].show({HTML: table, TEXT: "samples"})

    def _show_picture(self, face: Face, png: bytes) -> None:
        if self._controls is not None:
            self._controls.show_picture(png)
        else:
            text = visible(str(face.status))
            self._slots[1].show_picture(png, self._chart.size, text)


class LineView:
    """One line on standard error, for terminals and programs."""

    def __init__(self):
        often = sys.stderr.isatty()
        self._pace = Pace(NUMBERS_SECONDS if often else RARE_SECONDS, NUMBERS_SHARE)
        self._bar: tqdm | None = None

    @property
    def draw_seconds(self) -> float:
        """Seconds spent on the line in all."""
        return self._pace.seconds

    @property
    def due(self) -> bool:
        """Whether it is time for a refresh."""
        return self._pace.due

    def open(self, face: Face) -> None:
        """Begin the line."""
        total, done = face.status.total_steps, face.status.steps_done
        self._bar = tqdm(
            total=total,
            initial=done,
            bar_format=LINE,
            file=sys.stderr,
            delay=TINY,
            dynamic_ncols=True,
        )
        self.refresh(face, now=True)

    def refresh(self, face: Face, now: bool = False) -> None:
        """Write the line anew, if it is time."""
        if now or self.due:
            with self._pace.spending():
                self._write(face)
                self._bar.refresh()

    def close(self, face: Face) -> None:
        """End the line."""
        self._write(face)
        self._bar.close()  # writes it

    def _write(self, face: Face) -> None:
        status, history = face.status, face.history
        loss = f" · loss {history['smooth loss'][-1]:.3f}" if len(history) else ""
        self._bar.n = status.steps_done
        self._bar.set_description_str(_one_line(f"{status}{loss}"), refresh=False)


def _one_line(text: str) -> str:
    return " ".join(visible(text).split())
