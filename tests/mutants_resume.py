"""A training that can be stopped and resumed, and copies of it with one fault each."""

from __future__ import annotations

from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_map

from tests.toy_checks import EXAMPLES, adapted
from workbench.data.batches import collate
from workbench.tuning.losses import plain_loss
from workbench.tuning.schedules import learning_rate_at


class Loop:
    """Right: keeps weights, optimizer state and position; dropout is seeded by the step."""

    steps = 6

    def __init__(self, saved=None):
        self.model, self.position = adapted(dropout=0.1), 0
        self.model.train()
        self.optimizer = optim.AdamW(0.0, bias_correction=True)
        self._loss_and_gradients = nn.value_and_grad(self.model, plain_loss)
        if saved is not None:
            self.restore(SimpleNamespace(**saved))

    def step(self):
        """One update; returns its loss."""
        self.seed()
        rows = [(2 * self.data_position + k) % len(EXAMPLES) for k in range(2)]
        loss, gradients = self._loss_and_gradients(self.model, collate(EXAMPLES, rows))
        self.optimizer.learning_rate = learning_rate_at(
            self.schedule_position,
            schedule="cosine",
            peak=1e-2,
            floor=0.0,
            warmup_steps=1,
            total_steps=self.steps,
        )
        self.optimizer.update(self.model, gradients)
        mx.eval(self.model.trainable_parameters(), self.optimizer.state, loss)
        self.position += 1
        return loss.item()

    def seed(self):
        """The dropout of a step depends on its number alone."""
        mx.random.seed(self.position)

    @property
    def data_position(self):
        """Batches that were trained."""
        return self.position

    @property
    def schedule_position(self):
        """Steps by which the schedule has moved."""
        return self.position

    def save(self):
        """What a new process needs."""
        return {
            "weights": self.model.trainable_parameters(),
            "state": tree_map(lambda array: array, self.optimizer.state),
            "position": self.position,
        }

    def restore(self, saved):
        """Go on from there."""
        self.model.update(saved.weights)
        self.optimizer.state = tree_map(lambda array: array, saved.state)
        self.position = saved.position


class WeightsOnly(Loop):
    """Loses the optimizer's state, as mlx-lm's resume does."""

    def restore(self, saved):
        self.model.update(saved.weights)
        self.position = saved.position


class MomentsOnly(Loop):
    """Loses the optimizer's step count."""

    def restore(self, saved):
        super().restore(saved)
        self.optimizer.state["step"] = mx.array(0, mx.uint64)


class ScheduleFromZero(Loop):
    """Warms up once more."""

    start = 0

    @property
    def schedule_position(self):
        return self.position - self.start

    def restore(self, saved):
        super().restore(saved)
        self.start = saved.position


class DataFromZero(ScheduleFromZero):
    """Trains the first batches again."""

    data_position = ScheduleFromZero.schedule_position
    schedule_position = Loop.schedule_position


class StepRepeated(Loop):
    """Saves what was there before the last update."""

    before = None

    def step(self):
        self.before = super().save()
        return super().step()

    def save(self):
        return self.before


class BeginsAnew(Loop):
    """Does not use what was saved."""

    def restore(self, saved):
        pass


class AmbientDropout(Loop):
    """Draws dropout from the ambient random state and does not save it."""

    def seed(self):
        pass


class BatchRepeated(Loop):
    """Counts one batch less after the stop."""

    late = 0

    @property
    def data_position(self):
        return self.position - self.late

    def restore(self, saved):
        super().restore(saved)
        self.late = 1


class WeightsRounded(Loop):
    """Saves the weights in half precision."""

    def save(self):
        saved = super().save()
        half = tree_map(lambda a: a.astype(mx.bfloat16).astype(a.dtype), saved["weights"])
        return saved | {"weights": half}
