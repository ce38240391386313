"""Training code with one fault each, and training code that is right.

Toy models; each fault is a few lines over the correct form.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_map
from mlx_lm.tuner.trainer import default_loss as mlx_lm_loss

from tests.mutant import Mutant
from tests.toy import toy_examples, toy_model
from tests.toy_training import toy_trainer
from workbench.data.batches import PAD_ID, Batch, collate
from workbench.models.llama import Llama
from workbench.probes.findings import CheckReport
from workbench.probes.resuming import check_resume
from workbench.probes.training import check_training
from workbench.tuning.lora import LoRAConfig, LoRALinear, add_lora
from workbench.tuning.losses import cross_entropy, next_token_pairs, plain_loss, supervised_loss
from workbench.tuning.schedules import learning_rate_at

PROMPT = 3  # tokens of each row that are no targets
LENGTHS = (9, 14, 7, 12, 8, 10)
EXAMPLES = toy_examples(LENGTHS, seed=3, prompt=PROMPT)
BATCH = collate(EXAMPLES, range(4))  # three rows are padded
EVEN = collate(toy_examples([10] * 3, seed=4, prompt=PROMPT), range(3))  # no padding
MICRO_BATCHES = [collate(EXAMPLES, [2]), collate(EXAMPLES, [0, 1, 3])]  # 4 and 26 targets


def adapted(dropout: float = 0.0) -> Llama:
    """A toy model with a fresh adapter."""
    model = toy_model()
    add_lora(model, LoRAConfig(rank=4, dropout=dropout))
    return model


def arrays(batch: Batch) -> tuple[mx.array, mx.array, mx.array]:
    """inputs, targets, loss_mask (B, T - 1)."""
    return next_token_pairs(mx.array(batch.tokens), mx.array(batch.loss_mask))


def checked(
    loss_fn: Callable = plain_loss, model: nn.Module | None = None, batch=BATCH, **given
) -> CheckReport:
    """The report of a loss on the padded batch, the adapter training."""
    given.setdefault("mode", "lora")
    return check_training(model or adapted(), loss_fn, batch, **given)


def stepping(update: Callable, make_optimizer: Callable = lambda: optim.AdamW(1e-3)) -> CheckReport:
    """The report of a step, `update(model, optimizer, batch) → loss`."""
    model, optimizer = adapted(), make_optimizer()
    return checked(
        model=model, step=lambda batch: update(model, optimizer, batch), optimizer=optimizer
    )


def loss_and_gradients(model: nn.Module, batch: Batch) -> tuple[mx.array, dict]:
    """The right ones, of the trainable parameters."""
    return nn.value_and_grad(model, mean_loss)(model, batch)


# The loss


def mean_loss(model, batch):
    """Right: the mean over the supervised targets, and how many there are."""
    return plain_loss(model, batch) / batch.num_tokens, batch.num_tokens


def no_shift(model, batch):
    """Trains each position against its own token."""
    inputs, _, loss_mask = arrays(batch)
    return (cross_entropy(model(inputs), inputs) * loss_mask).sum()


def shift_by_two(model, batch):
    """Trains each position against the token after the next."""
    inputs, targets, loss_mask = arrays(batch)
    return (cross_entropy(model(inputs)[:, :-1], targets[:, 1:]) * loss_mask[:, 1:]).sum()


class DropsItsLast(Llama):
    """Shifts by itself: no logits for the last token."""

    def __call__(self, tokens, cache=None, padding=None):
        return super().__call__(tokens[:, :-1], cache, padding)


class MovesItsLogits(Llama):
    """Shifts by itself: its output begins with the logits of the second token."""

    def __call__(self, tokens, cache=None, padding=None):
        return super().__call__(tokens, cache, padding)[:, 1:]


def loss_of_shifting_model(cut: slice) -> Callable:
    """Shifts as well, and cuts the targets to fit."""

    def loss_fn(model, batch):
        inputs, targets, loss_mask = arrays(batch)
        return (cross_entropy(model(inputs), targets[:, cut]) * loss_mask[:, cut]).sum()

    return loss_fn


def shifting(kind: type[Llama], cut: slice) -> CheckReport:
    """The report of a model and a loss that both shift."""
    model = adapted()
    model.__class__ = kind
    return checked(loss_of_shifting_model(cut), model)


def mask_ignored(model, batch):
    """Trains prompt and padding too."""
    inputs, targets, _ = arrays(batch)
    return cross_entropy(model(inputs), targets).sum()


def prompt_trained(model, batch):
    """Masks the padding only."""
    inputs, targets, _ = arrays(batch)
    return (cross_entropy(model(inputs), targets) * (targets != PAD_ID)).sum()


def mask_not_shifted(model, batch):
    """Takes the mask of the inputs for that of the targets."""
    inputs, targets, _ = arrays(batch)
    return (cross_entropy(model(inputs), targets) * mx.array(batch.loss_mask)[:, :-1]).sum()


def mlx_lm_default_loss(model, batch):
    """mlx-lm's own, given what its batches hold: offset and length of each row."""
    lengths = [(PROMPT, int(row.nonzero()[0].max()) + 1) for row in batch.loss_mask]
    return mlx_lm_loss(model, mx.array(batch.tokens), mx.array(lengths))


def mean_of_rows(model, batch):
    """Averages each row, then the rows."""
    inputs, targets, loss_mask = arrays(batch)
    losses = cross_entropy(model(inputs), targets) * loss_mask
    return (losses.sum(axis=1) / loss_mask.sum(axis=1)).mean()


def mean_of_positions(model, batch):
    """Divides by all positions, masked ones included."""
    inputs, targets, loss_mask = arrays(batch)
    return (cross_entropy(model(inputs), targets) * loss_mask).mean()


def cut_off(model, batch):
    """Cuts the gradient between model and loss."""
    inputs, targets, loss_mask = arrays(batch)
    return (cross_entropy(mx.stop_gradient(model(inputs)), targets) * loss_mask).sum()


def half_cut_off(model, batch):
    """Cuts the gradient of the softmax's denominator."""
    inputs, targets, loss_mask = arrays(batch)
    logits = model(inputs)
    chosen = mx.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return ((mx.stop_gradient(logits.logsumexp(axis=-1)) - chosen) * loss_mask).sum()


@mx.custom_function
def scaled(x):
    """The identity."""
    return x


@scaled.vjp
def _(primals, cotangents, _):
    return cotangents * 0.5  # wrong


def wrong_vjp() -> CheckReport:
    """The report of a model with a backward pass of its own in one of its layers."""
    model = adapted()
    mlp = model.layers[1].mlp

    class Halved(type(mlp)):
        def __call__(self, x):
            return scaled(super().__call__(x))

    mlp.__class__ = Halved
    return checked(model=model)


def dropout_left_on(model, batch):
    """Turns dropout on by itself."""
    model.train()
    return plain_loss(model, batch)


def tokens_dropped(model, batch):
    """Drops a tenth of the targets by the ambient random state."""
    inputs, targets, loss_mask = arrays(batch)
    keep = mx.random.uniform(shape=targets.shape) > 0.1
    return (cross_entropy(model(inputs), targets) * loss_mask * keep).sum()


def another_model() -> CheckReport:
    """The report of a loss that closes over a model of its own."""
    other = adapted()
    return checked(lambda model, batch: plain_loss(other, batch))


# The gradients


def averaged_micro_batches(model, batches):
    """Averages the means of micro-batches, whatever number of targets each has."""
    gradients = [loss_and_gradients(model, batch)[1] for batch in batches]
    return tree_map(lambda *g: sum(g) / len(g), *gradients)


def weighted_micro_batches(model, batches):
    """Right: sums over micro-batches, divided by all their targets once."""
    total = sum(batch.num_tokens for batch in batches)
    gradients = [nn.value_and_grad(model, plain_loss)(model, batch)[1] for batch in batches]
    return tree_map(lambda *g: sum(g) / total, *gradients)


def gradients_of_all(model, batches):
    """Differentiates by frozen parameters too."""

    def loss(parameters):
        model.update(parameters)
        return sum(plain_loss(model, batch) for batch in batches)

    return mx.grad(loss)(model.parameters())


# Who trains


def injected_then_frozen() -> CheckReport:
    """Freezes the adapter together with the base."""
    model = adapted()
    model.freeze()
    return checked(model=model)


def bare_unfreeze() -> CheckReport:
    """Thaws everything."""
    model = adapted()
    model.unfreeze()
    return checked(model=model)


def only_lora_a(mode: str | None) -> CheckReport:
    """Leaves lora_b frozen, at zero."""
    model = adapted()
    model.freeze()
    model.unfreeze(keys="lora_a", strict=False)
    return checked(model=model, mode=mode)


def detached_adapter() -> CheckReport:
    """One adapted layer calls the plain layer only."""

    class Detached(LoRALinear):
        def __call__(self, x):
            return self.linear(x)

    model = adapted()
    model.layers[0].self_attn.q_proj.__class__ = Detached
    return checked(model=model)


# The step


def right_step(model, optimizer, batch):
    """Right: gradients of what trains, one update, one evaluation."""
    (loss, _), gradients = loss_and_gradients(model, batch)
    optimizer.update(model, gradients)
    mx.eval(model.trainable_parameters(), optimizer.state, loss)
    return loss.item()


def updates_all(model, optimizer, batch):
    """Updates frozen parameters too."""
    optimizer.update(model, gradients_of_all(model, [batch]))
    mx.eval(model.parameters(), optimizer.state)
    return 0.0


def decays_all(model, optimizer, batch):
    """Decays frozen parameters too."""
    loss = right_step(model, optimizer, batch)
    model.update(tree_map(lambda p: p * 0.999, model.parameters()))
    mx.eval(model.parameters())
    return loss


def no_update(model, optimizer, batch):
    """Forgets the optimizer."""
    (loss, _), gradients = loss_and_gradients(model, batch)
    mx.eval(loss, gradients)
    return loss.item()


def update_of_a_copy(model, optimizer, batch):
    """Drops the new parameters."""
    (loss, _), gradients = loss_and_gradients(model, batch)
    new = optimizer.apply_gradients(gradients, model)
    mx.eval(new, optimizer.state, loss)
    return loss.item()


def new_optimizer(model, optimizer, batch):
    """Makes the optimizer anew at every step."""
    return right_step(model, optim.AdamW(1e-3), batch)


def state_set_back(model, optimizer, batch):
    """Forgets the moments before every step."""
    optimizer.state = {"step": optimizer.state["step"], "learning_rate": mx.array(1e-3)}
    return right_step(model, optimizer, batch)


def never_evaluated(model, optimizer, batch):
    """Leaves everything to be evaluated some day."""
    (loss, _), gradients = loss_and_gradients(model, batch)
    optimizer.update(model, gradients)
    return loss


def only_loss_evaluated(model, optimizer, batch):
    """Leaves the update to the next step."""
    return never_evaluated(model, optimizer, batch).item()


def state_not_evaluated(model, optimizer, batch):
    """Evaluates the parameters only: AdamW's step count is read by none of them."""
    loss = never_evaluated(model, optimizer, batch)
    mx.eval(model.parameters(), loss)
    return loss


def loss_not_evaluated(model, optimizer, batch):
    """Keeps a loss with its graph."""
    loss = never_evaluated(model, optimizer, batch)
    mx.eval(model.parameters(), optimizer.state)
    return loss + 0.0


# Terms of the loss


def provenance(model, batch):
    """α (ln(1 − w + 1e-8) + H)² of the documents: of the data alone (R32)."""
    authority, entropy = mx.array([0.9, 0.2, 0.5, 0.7]), mx.array([1.0, 4.0, 3.0, 2.0])
    return (2.7 * (mx.log(1 - authority + 1e-8) + entropy).square()).mean()


def with_provenance(model, batch):
    """Cross-entropy and the provenance term."""
    return plain_loss(model, batch) + 0.1 * provenance(model, batch)


def confidence(model, batch):
    """The mean entropy of the predictions, which does reach the parameters."""
    logits = model(arrays(batch)[0])
    return -(mx.softmax(logits, axis=-1) * nn.log_softmax(logits, axis=-1)).sum(axis=-1).mean()


def cut_confidence(model, batch):
    """The same, cut off."""
    return mx.stop_gradient(confidence(model, batch))


# A training that can be stopped


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


def _mutants_of_the_loss() -> list[Mutant]:
    both = "model and loss both shift"
    micro = {"batch": MICRO_BATCHES, "gradients": averaged_micro_batches}
    return [
        Mutant("no shift", 1, "shift", lambda: checked(no_shift)),
        Mutant("shift by two", 1, "shift", lambda: checked(shift_by_two)),
        Mutant(
            f"{both}: by two",
            1,
            "shift",
            lambda: shifting(DropsItsLast, slice(1, None)),
        ),
        Mutant(
            f"{both}: by none",
            1,
            "shift",
            lambda: shifting(MovesItsLogits, slice(None, -1)),
        ),
        Mutant("mask ignored: padding", 7, "padding", lambda: checked(mask_ignored)),
        Mutant("mask ignored: prompt", 7, "mask", lambda: checked(mask_ignored, batch=EVEN)),
        Mutant("prompt trained", 7, "mask", lambda: checked(prompt_trained)),
        Mutant("mask not shifted", 7, "mask", lambda: checked(mask_not_shifted)),
        Mutant("mlx-lm's default_loss", 7, "padding", lambda: checked(mlx_lm_default_loss)),
        Mutant("mean of row means", 7, "reduction", lambda: checked(mean_of_rows)),
        Mutant("mean of all positions", 7, "reduction", lambda: checked(mean_of_positions)),
        Mutant("micro-batches averaged", 7, "reduction", lambda: checked(mean_loss, **micro)),
        Mutant("loss of another model", 8, "loss", another_model),
        Mutant(
            "dropout left on",
            9,
            "loss",
            lambda: checked(dropout_left_on, adapted(dropout=0.2)),
        ),
        Mutant("ambient random numbers", 9, "loss", lambda: checked(tokens_dropped)),
        Mutant("logits cut off", 8, "gradients", lambda: checked(cut_off)),
        Mutant("softmax cut off", 8, "finite differences", lambda: checked(half_cut_off)),
        Mutant("wrong vjp", 8, "finite differences", wrong_vjp),
        Mutant(
            "provenance term",
            10,
            "loss terms",
            lambda: checked(with_provenance, terms={"provenance": provenance}),
        ),
        Mutant(
            "term behind stop_gradient",
            10,
            "loss terms",
            lambda: checked(terms={"confidence": cut_confidence}),
        ),
    ]


def _mutants_of_the_step() -> list[Mutant]:
    return [
        Mutant("inject, then freeze", 8, "trainable set", injected_then_frozen),
        Mutant("bare unfreeze", 8, "trainable set", bare_unfreeze),
        Mutant("only lora_a trains", 8, "trainable set", lambda: only_lora_a("lora")),
        Mutant("only lora_a, no mode", 8, "gradients", lambda: only_lora_a(None)),
        Mutant("adapter not called", 8, "movement", detached_adapter),
        Mutant(
            "mx.value_and_grad",
            8,
            "gradients",
            lambda: checked(gradients=gradients_of_all),
        ),
        Mutant("frozen weights updated", 8, "frozen", lambda: stepping(updates_all)),
        Mutant("frozen weights decayed", 8, "frozen", lambda: stepping(decays_all)),
        Mutant("optimizer never called", 8, "movement", lambda: stepping(no_update)),
        Mutant("update of a copy", 8, "movement", lambda: stepping(update_of_a_copy)),
        Mutant("optimizer made anew", 9, "optimizer", lambda: stepping(new_optimizer)),
        Mutant("nothing evaluated", 11, "evaluation", lambda: stepping(never_evaluated)),
        Mutant("only the loss evaluated", 11, "evaluation", lambda: stepping(only_loss_evaluated)),
        Mutant("state not evaluated", 11, "evaluation", lambda: stepping(state_not_evaluated)),
        Mutant("loss kept pending", 11, "evaluation", lambda: stepping(loss_not_evaluated)),
    ]


def _mutants_of_resuming() -> list[Mutant]:
    kinds = [
        ("optimizer state lost", "resumed optimizer", WeightsOnly),
        ("step count lost", "resumed optimizer", MomentsOnly),
        ("schedule position lost", "resumed optimizer", ScheduleFromZero),
        ("step repeated", "resumed position", StepRepeated),
        ("begins anew", "resumed position", BeginsAnew),
        ("batch repeated", "resumed losses", BatchRepeated),
        ("data position lost", "resumed losses", DataFromZero),
        ("dropout not restored", "resumed losses", AmbientDropout),
        ("weights rounded", "resumed weights", WeightsRounded),
    ]
    return [
        Mutant(name, 9, check, lambda kind=kind: check_resume(kind)) for name, check, kind in kinds
    ]


MUTANTS: tuple[Mutant, ...] = (
    *_mutants_of_the_loss(),
    *_mutants_of_the_step(),
    *_mutants_of_resuming(),
)


# What is right


def head_only() -> CheckReport:
    """The report of training final norm and lm_head."""
    model = toy_model(tie_word_embeddings=False)
    model.freeze()
    model.lm_head.unfreeze()
    model.model.norm.unfreeze()
    return checked(model=model, mode="head")


def warm_up_from_zero() -> CheckReport:
    """The report of a step whose first update has a learning rate of 0."""
    return stepping(right_step, lambda: optim.AdamW(optim.linear_schedule(0.0, 1e-2, 4)))


def own_trainer() -> CheckReport:
    """The report of the workbench's own trainer."""
    trainer = toy_trainer(dropout=0.1, steps=4, warmup_steps=1)
    return checked(
        supervised_loss,
        trainer.model,
        step=lambda batch: trainer.step(),
        optimizer=trainer.optimizer,
    )


CORRECT: tuple[tuple[str, Callable[[], CheckReport]], ...] = (
    ("plain_loss", checked),
    ("supervised_loss", lambda: checked(supervised_loss)),
    ("mean over targets", lambda: checked(mean_loss)),
    ("with dropout", lambda: checked(model=adapted(dropout=0.2))),
    ("mlx-lm's default_loss, no padding", lambda: checked(mlx_lm_default_loss, batch=EVEN)),
    ("mode head", head_only),
    ("mode full", lambda: checked(model=toy_model(), mode="full")),
    (
        "micro-batches weighted by targets",
        lambda: checked(batch=MICRO_BATCHES, gradients=weighted_micro_batches),
    ),
    (
        "loss terms that reach parameters",
        lambda: checked(terms={"cross-entropy": plain_loss, "confidence": confidence}),
    ),
    ("step of its own", lambda: stepping(right_step)),
    ("step with SGD", lambda: stepping(right_step, lambda: optim.SGD(1e-1))),
    ("warm-up from zero", warm_up_from_zero),
    ("the workbench's Trainer", own_trainer),
    ("resumable training", lambda: check_resume(Loop)),
)
