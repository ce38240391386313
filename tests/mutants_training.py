"""Training code with one fault each, and the heading that must catch it; code that is right."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import mlx.optimizers as optim

from tests import mutants_resume as resume
from tests import mutants_targets as targets
from tests import mutants_updates as updates
from tests.mutant import Mutant
from tests.mutants_updates import stepping
from tests.toy import toy_model
from tests.toy_checks import EVEN, MICRO_BATCHES, adapted, checked, mean_loss
from workbench.probes.findings import CheckReport
from workbench.probes.resuming import check_resume
from workbench.tuning.losses import plain_loss, supervised_loss


def found(bug: int, check: str, name: str, run: Callable, *args, **given) -> Mutant:
    """A mutant whose report is `run(*args, **given)`."""
    return Mutant(name, bug, check, partial(run, *args, **given))


def dropping(loss_fn: Callable = plain_loss) -> CheckReport:
    """The report of a loss where the adapter drops a fifth of its inputs."""
    return checked(loss_fn, adapted(dropout=0.2))


R, T, U = resume, targets, updates
BOTH = "model and loss both shift"
AVERAGED = {"batch": MICRO_BATCHES, "gradients": T.averaged_micro_batches}
WEIGHTED = {"batch": MICRO_BATCHES, "gradients": T.weighted_micro_batches}
PROVENANCE, CUT_OFF = {"provenance": U.provenance}, {"confidence": U.cut_confidence}
REACHING = {"cross-entropy": plain_loss, "confidence": U.confidence}
MUTANTS: tuple[Mutant, ...] = (
    found(1, "shift", "no shift", checked, T.no_shift),
    found(1, "shift", "shift by two", checked, T.shift_by_two),
    found(1, "shift", f"{BOTH}: by two", T.shifting, T.DropsItsLast, slice(1, None)),
    found(1, "shift", f"{BOTH}: by none", T.shifting, T.MovesItsLogits, slice(None, -1)),
    found(7, "padding", "mask ignored: padding", checked, T.mask_ignored),
    found(7, "mask", "mask ignored: prompt", checked, T.mask_ignored, batch=EVEN),
    found(7, "mask", "prompt trained", checked, T.prompt_trained),
    found(7, "mask", "mask not shifted", checked, T.mask_not_shifted),
    found(7, "padding", "mlx-lm's default_loss", checked, T.mlx_lm_default_loss),
    found(7, "reduction", "mean of row means", checked, T.mean_of_rows),
    found(7, "reduction", "mean of all positions", checked, T.mean_of_positions),
    found(7, "reduction", "micro-batches averaged", checked, mean_loss, **AVERAGED),
    found(8, "loss", "loss of another model", T.another_model),
    found(9, "loss", "dropout left on", dropping, T.dropout_left_on),
    found(9, "loss", "ambient random numbers", checked, T.tokens_dropped),
    found(8, "gradients", "logits cut off", checked, U.cut_off),
    found(8, "finite differences", "softmax cut off", checked, U.half_cut_off),
    found(8, "finite differences", "wrong vjp", U.wrong_vjp),
    found(10, "loss terms", "provenance term", checked, U.with_provenance, terms=PROVENANCE),
    found(10, "loss terms", "term behind stop_gradient", checked, terms=CUT_OFF),
    found(8, "trainable set", "inject, then freeze", U.injected_then_frozen),
    found(8, "trainable set", "bare unfreeze", U.bare_unfreeze),
    found(8, "trainable set", "only lora_a trains", U.only_lora_a, "lora"),
    found(8, "gradients", "only lora_a, no mode", U.only_lora_a, None),
    found(8, "movement", "adapter not called", U.detached_adapter),
    found(8, "gradients", "mx.value_and_grad", checked, gradients=U.gradients_of_all),
    found(8, "frozen", "frozen weights updated", stepping, U.updates_all),
    found(8, "frozen", "frozen weights decayed", stepping, U.decays_all),
    found(8, "movement", "optimizer never called", stepping, U.no_update),
    found(8, "movement", "update of a copy", stepping, U.update_of_a_copy),
    found(9, "optimizer", "optimizer made anew", stepping, U.new_optimizer),
    found(9, "optimizer", "moments forgotten", stepping, U.state_set_back),
    found(11, "evaluation", "nothing evaluated", stepping, U.never_evaluated),
    found(11, "evaluation", "only the loss evaluated", stepping, U.only_loss_evaluated),
    found(11, "evaluation", "state not evaluated", stepping, U.state_not_evaluated),
    found(11, "evaluation", "loss kept pending", stepping, U.loss_not_evaluated),
    found(9, "resumed optimizer", "optimizer state lost", check_resume, R.WeightsOnly),
    found(9, "resumed optimizer", "step count lost", check_resume, R.MomentsOnly),
    found(9, "resumed optimizer", "schedule position lost", check_resume, R.ScheduleFromZero),
    found(9, "resumed position", "step repeated", check_resume, R.StepRepeated),
    found(9, "resumed position", "begins anew", check_resume, R.BeginsAnew),
    found(9, "resumed losses", "batch repeated", check_resume, R.BatchRepeated),
    found(9, "resumed losses", "data position lost", check_resume, R.DataFromZero),
    found(9, "resumed losses", "dropout not restored", check_resume, R.AmbientDropout),
    found(9, "resumed weights", "weights rounded", check_resume, R.WeightsRounded),
)

CORRECT: tuple[tuple[str, Callable[[], CheckReport]], ...] = (
    ("plain_loss", checked),
    ("supervised_loss", partial(checked, supervised_loss)),
    ("mean over targets", partial(checked, mean_loss)),
    ("with dropout", dropping),
    ("mlx-lm's default_loss, no padding", partial(checked, T.mlx_lm_default_loss, batch=EVEN)),
    ("mode head", U.head_only),
    ("mode full", lambda: checked(model=toy_model(), mode="full")),
    ("micro-batches weighted by targets", partial(checked, **WEIGHTED)),
    ("loss terms that reach parameters", partial(checked, terms=REACHING)),
    ("step of its own", partial(stepping, U.right_step)),
    ("step with SGD", partial(stepping, U.right_step, lambda: optim.SGD(1e-1))),
    ("warm-up from zero", U.warm_up_from_zero),
    ("the workbench's Trainer", U.own_trainer),
    ("resumable training", partial(check_resume, R.Loop)),
)
