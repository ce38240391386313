"""Broken networks, and the heading under which `check_model` must catch each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import mlx.nn as nn

from tests import mutants_attention as attention
from tests import mutants_network as network
from tests.mutant import Mutant
from tests.mutants_attention import with_attention, with_cache
from tests.mutants_network import loaded_in_part, of_class, with_layers, with_mlp
from tests.toy import toy_model
from workbench.probes.findings import CheckReport
from workbench.probes.invariants import check_model


def renamed() -> CheckReport:
    """The file says `attention` where the network says `self_attn`; strict=False."""
    model, report = loaded_in_part(lambda name: name.replace("self_attn", "attention"))
    return check_model(model, report=report)


def random_biases() -> CheckReport:
    """The network has biases that the file does not have."""
    model, report = loaded_in_part(lambda name: name, attention_bias=True)
    return check_model(model, report=report)


def alone(make: Callable[[], nn.Module]) -> Callable[[], CheckReport]:
    """Checked by itself."""
    return lambda: check_model(make())


def compared(make: Callable[[], nn.Module]) -> Callable[[], CheckReport]:
    """Checked against the correct toy: what no property of one network alone can show."""
    return lambda: check_model(make(), reference=toy_model())


def found(bug: int, check: str, name: str, make: Callable, *args, **kwargs) -> Mutant:
    """A mutant that a look at the network alone must find."""
    return Mutant(name, bug, check, alone(partial(make, *args, **kwargs)))


def parted(bug: int, name: str, make: Callable, *args, **kwargs) -> Mutant:
    """A mutant that only a reference shows."""
    return Mutant(name, bug, "reference", compared(partial(make, *args, **kwargs)))


A, N = attention, network
MUTANTS = (
    found(1, "output", "the model drops its last logit", of_class, N.DropsLastLogit),
    found(1, "shift", "the model shifts its inputs right", of_class, N.ShiftsInputs),
    found(1, "causality", "the model shifts its logits left", of_class, N.ShiftsLogits),
    found(1, "loss", "model(tokens, targets) shifts again", of_class, N.ShiftsTargetsAgain),
    found(2, "causality", "causal mask reversed", with_attention, A.ReversedMask),
    found(2, "causality", "causal mask absent", with_attention, A.NoMask),
    found(2, "causality", "mask lets one future token in", with_attention, A.SeesOneAhead),
    found(2, "causality", "a token sees only itself", with_attention, A.SeesOnlyItself),
    found(2, "causality", "a window nobody asked for", with_attention, A.SeesTheLastTwo),
    found(2, "finite", "the first token sees nothing", with_attention, A.HidesItself),
    found(3, "position order", "RoPE over the heads axis", with_attention, A.RotatesHeads),
    found(3, "position order", "RoPE forgotten", with_attention, A.ForgetsRotation),
    found(3, "position offset", "RoPE ignores the offset", with_attention, A.IgnoresOffset),
    found(3, "relative position", "offset on queries only", with_attention, A.OffsetOnQueries),
    found(3, "relative position", "RoPE on queries only", with_attention, A.RotatesQueries),
    parted(3, "traditional RoPE on half-split weights", A.interleaved_rope),
    parted(3, "half-split RoPE on traditional weights", A.interleaved_weights),
    parted(3, "another rope_theta", toy_model, rope_theta=500.0),
    found(4, "grouped heads", "key/value heads tiled", with_attention, A.TilesHeads),
    found(4, "grouped heads", "value heads tiled", with_attention, A.TilesValues),
    found(4, "grouped heads", "heads and features swapped", with_attention, A.SwapsHeads),
    found(4, "batch", "heads joined on the batch axis", with_attention, A.JoinsOnBatchAxis),
    Mutant("`attention` for `self_attn`, in silence", 5, "weights", renamed),
    Mutant("biases left at random", 5, "weights", random_biases),
    found(6, "cache", "cache overwritten by the newest", with_cache, A.KeepsTheLast),
    found(6, "cache", "cache written from 0", with_cache, A.WritesAtZero),
    found(6, "cache", "cache joined on the heads axis", with_cache, A.JoinsOnHeads),
    found(6, "cache", "cache joined on the batch axis", with_cache, A.JoinsOnBatch),
    found(6, "cache", "cache sliced from 0", with_cache, A.SlicesFromZero),
    found(6, "cache", "cache never advances", with_cache, A.NeverAdvances),
    found(6, "cache", "past values lost, keys kept", with_cache, A.KeysOnly),
    found(7, "padding", "declared padding is seen", of_class, N.SeesPadding),
    found(7, "padding", "a mean over the sequence", of_class, N.CentresOverTime),
    found(8, "gradients", "the feed-forward layer is detached", with_mlp, N.Detached),
    found(12, "norm epsilon", "epsilon 1e-3 for 1e-5", N.with_epsilon, 1e-3),
    found(12, "norm epsilon", "epsilon 1e-8 for 1e-5", N.with_epsilon, 1e-8),
    parted(12, "norm after the block", with_layers, N.PostNorm),
    parted(12, "no final norm", of_class, N.ForgetsFinalNorm),
    parted(12, "a residual forgotten", with_layers, N.ForgetsResidual),
    parted(12, "gate and up exchanged", with_mlp, N.UpIsGate),
    found(12, "softcap", "softcap missing", N.softcap_missing),
    found(12, "softcap", "softcap of another height", N.softcapped, 30.0),
    found(12, "head", "an lm_head where the head is tied", N.untied_for_tied),
    found(12, "head", "the embedding where lm_head is its own", N.tied_for_untied),
)


def layered_reference() -> CheckReport:
    """The same weights twice: nothing departs."""
    return check_model(toy_model(), reference=toy_model())


CORRECT = (
    ("toy Llama, against itself", layered_reference),
    ("toy Llama, untied", alone(partial(toy_model, tie_word_embeddings=False))),
    ("toy Llama with biases", alone(partial(toy_model, attention_bias=True, mlp_bias=True))),
    ("toy Llama, as many key/value heads", alone(partial(toy_model, num_key_value_heads=4))),
    ("attention with its steps apart", alone(partial(with_attention, A.OpenAttention))),
    ("model(tokens, targets)", alone(partial(of_class, N.LossInside))),
    ("softcapped", alone(N.softcapped)),
)
