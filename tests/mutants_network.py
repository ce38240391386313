"""Broken networks around attention: shift, padding, norms, feed-forward, head, loading."""

from __future__ import annotations

import types
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from tests.toy import toy_model
from workbench.models.layers import SwiGLU
from workbench.models.llama import DecoderLayer, Llama
from workbench.models.report import LoadReport, compare


def of_class(kind: type[nn.Module], model: nn.Module | None = None, **changes) -> nn.Module:
    """A toy of another class, weights unchanged."""
    model = model or toy_model(**changes)
    model.__class__ = kind
    return model


# 1: the shift


class DropsLastLogit(Llama):
    def __call__(self, tokens, cache=None):
        return super().__call__(tokens, cache)[:, :-1]


class ShiftsInputs(Llama):
    def __call__(self, tokens, cache=None):
        return super().__call__(mx.concatenate([tokens[:, :1] * 0, tokens[:, :-1]], axis=1))


class ShiftsLogits(Llama):
    def __call__(self, tokens):
        logits = super().__call__(tokens)
        return mx.concatenate([logits[:, 1:], logits[:, :1] * 0], axis=1)


class LossInside(Llama):
    shift = 0

    def __call__(self, tokens, targets=None, cache=None):
        logits = super().__call__(tokens, cache)
        if targets is None:
            return logits
        keep = targets.shape[1] - self.shift
        return nn.losses.cross_entropy(logits[:, :keep], targets[:, self.shift :]).mean()


class ShiftsTargetsAgain(LossInside):
    shift = 1


# 7: padding


class SeesPadding(Llama):
    def __call__(self, tokens, cache=None, padding=None):
        return super().__call__(tokens, cache)


class CentresOverTime(Llama):
    def head(self, hidden_states):
        return super().head(hidden_states - hidden_states.mean(axis=1, keepdims=True))


# 12: epsilon, norms, softcap, head; activations and gradients


class PostNorm(DecoderLayer):
    def __call__(self, x, mask, cache=None):
        x = x + self.input_layernorm(self.self_attn(x, mask, cache))
        return x + self.post_attention_layernorm(self.mlp(x))


class ForgetsResidual(DecoderLayer):
    def __call__(self, x, mask, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), mask, cache)
        return self.mlp(self.post_attention_layernorm(x))


class UpIsGate(SwiGLU):
    def __call__(self, x):
        up = self.up_proj(x)
        return self.down_proj(up * mx.sigmoid(up) * self.gate_proj(x))


class Detached(SwiGLU):
    def __call__(self, x):
        return mx.stop_gradient(super().__call__(x))


class Softcapped(Llama):
    cap = 2.0

    def head(self, hidden_states):
        return self.cap * mx.tanh(super().head(hidden_states) / self.cap)


class ForgetsFinalNorm(Llama):
    def head(self, hidden_states):
        return self.model.embed_tokens.as_linear(hidden_states)


def configured(model: Llama, **settings: object) -> Llama:
    """A toy whose configuration may say something else than its network does."""
    model.config = types.SimpleNamespace(**{**vars(model.config), **settings})
    return model


def softcapped(declared: float = Softcapped.cap) -> Llama:
    """A toy that softcaps its logits at 2, with a configuration that says `declared`."""
    return configured(of_class(Softcapped), final_logit_softcapping=declared)


def softcap_missing() -> Llama:
    return configured(toy_model(), final_logit_softcapping=30.0)


class OwnHead(Llama):
    """Reads its own head, whatever the configuration says."""

    def head(self, hidden_states):
        return self.lm_head(self.model.norm(hidden_states))


class TiedHead(Llama):
    """Reads the embedding, whatever the configuration says."""

    def head(self, hidden_states):
        return self.model.embed_tokens.as_linear(self.model.norm(hidden_states))


def untied_for_tied() -> Llama:
    return configured(of_class(OwnHead, tie_word_embeddings=False), tie_word_embeddings=True)


def tied_for_untied() -> Llama:
    return configured(of_class(TiedHead), tie_word_embeddings=False)


def with_layers(kind: type[DecoderLayer]) -> Llama:
    model = toy_model()
    for layer in model.layers:
        layer.__class__ = kind
    return model


def with_mlp(kind: type[SwiGLU]) -> Llama:
    model = toy_model()
    for layer in model.layers:
        layer.mlp.__class__ = kind
    return model


def with_epsilon(epsilon: float) -> Llama:
    model = toy_model()
    for _, module in model.named_modules():
        if isinstance(module, nn.RMSNorm):
            module.eps = epsilon
    return model


# 5: what the file does not fill


def loaded_in_part(rename: Callable[[str], str], **changes: object) -> tuple[Llama, LoadReport]:
    """A fresh network that took what fitted from a file, in silence, and the report of it."""
    file = {rename(name): array for name, array in tree_flatten(toy_model().parameters())}
    model = toy_model(seed=1, **changes)
    expected = dict(tree_flatten(model.parameters()))
    report = compare(expected, file)
    model.update(tree_unflatten([(name, file[name]) for name in report.loaded]))
    return model, report
