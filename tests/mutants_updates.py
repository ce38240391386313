"""Gradients, steps and loss terms with one fault each, and some that are right.

Each fault is a few lines over the correct form.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_map

from tests.toy import toy_model
from tests.toy_checks import adapted, arrays, checked, loss_and_gradients
from tests.toy_training import toy_trainer
from workbench.probes.findings import CheckReport
from workbench.tuning.lora_layers import LoRALinear
from workbench.tuning.losses import cross_entropy, plain_loss, supervised_loss

# What trains


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


def head_only() -> CheckReport:
    """The report of training final norm and lm_head."""
    model = toy_model(tie_word_embeddings=False)
    model.freeze()
    model.lm_head.unfreeze()
    model.model.norm.unfreeze()
    return checked(model=model, mode="head")


# The gradients


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


def gradients_of_all(model, batches):
    """Differentiates by frozen parameters too."""

    def loss(parameters):
        model.update(parameters)
        return sum(plain_loss(model, batch) for batch in batches)

    return mx.grad(loss)(model.parameters())


# The step


def stepping(update: Callable, make_optimizer: Callable = lambda: optim.AdamW(1e-3)) -> CheckReport:
    """The report of a step, `update(model, optimizer, batch) → loss`."""
    model, optimizer = adapted(), make_optimizer()
    return checked(
        model=model, step=lambda batch: update(model, optimizer, batch), optimizer=optimizer
    )


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
