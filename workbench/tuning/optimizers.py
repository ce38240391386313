"""From a configuration to an optimizer: MLX's rules, in blocks where every number is by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.optimizers as optim

from workbench.tuning.blocks import Blockwise
from workbench.tuning.config import TrainConfig

Belongs = Callable[[str, mx.array], bool]

AS_MATRICES = "muon"  # orthogonalises matrices; vectors and tables of tokens are AdamW's


class BlockwiseAdamW(Blockwise, optim.AdamW):
    """MLX's AdamW, in blocks."""


class BlockwiseAdam(Blockwise, optim.Adam):
    """MLX's Adam, in blocks."""


class BlockwiseSGD(Blockwise, optim.SGD):
    """MLX's SGD, in blocks."""


class BlockwiseLion(Blockwise, optim.Lion):
    """MLX's Lion, in blocks."""


class GroupedOptimizer(optim.MultiOptimizer):
    """Optimizers for groups of parameters, each with a multiple of one learning rate.

    Args:
        groups: (belongs, optimizer, ratio) each; a parameter is the first group's whose
            belongs(name, array) says so. The last group takes what is left.
    """

    def __init__(self, groups: Sequence[tuple[Belongs, optim.Optimizer, float]]):
        belongs, optimizers, ratios = zip(*groups)
        super().__init__(list(optimizers), list(belongs[:-1]))
        self.ratios = ratios

    @property
    def learning_rate(self) -> mx.array:
        """That of a group with the ratio 1."""
        return self.optimizers[-1].learning_rate / self.ratios[-1]

    @learning_rate.setter
    def learning_rate(self, rate: float) -> None:
        for optimizer, ratio in zip(self.optimizers, self.ratios):
            optimizer.learning_rate = ratio * rate


def make_optimizer(config: TrainConfig) -> optim.Optimizer:
    """The optimizer of a configuration; its learning rate is set anew at every step.

    adamw: Loshchilov and Hutter 2019, adam: Kingma and Ba 2015, both with the correction of their
    first steps unless that is switched off; sgd with momentum; lion: Chen et al. 2023; adafactor:
    Shazeer and Stern 2018, at the given rate; muon: Jordan et al. 2024, for matrices, with AdamW
    for all else (vectors, embeddings, the head).

    With a `lora_plus_ratio` other than 1 every lora_b learns faster by it (Hayou et al. 2024).
    """
    ratio, groups = config.lora_plus_ratio, []
    kinds = [(_is_matrix, _muon), (_is_any, _adamw)]
    for belongs, make in kinds if config.optimizer == AS_MATRICES else [(_is_any, _plain)]:
        if ratio != 1:
            groups.append((_faster(belongs), make(config), ratio))
        groups.append((belongs, make(config), 1.0))
    return groups[0][1] if len(groups) == 1 else GroupedOptimizer(groups)


def _is_any(name: str, array: mx.array) -> bool:
    return True


def _is_matrix(name: str, array: mx.array) -> bool:
    return array.ndim == 2 and not any(part in name for part in ("embed", "lm_head", "wte"))


def _faster(belongs: Belongs) -> Belongs:
    def is_lora_b(name: str, array: mx.array) -> bool:
        return name.rpartition(".")[2] == "lora_b" and belongs(name, array)

    return is_lora_b


def _plain(config: TrainConfig) -> optim.Optimizer:
    decay, momentum = config.weight_decay, config.momentum
    if config.optimizer == "adamw":
        return _adamw(config)
    if config.optimizer == "adam":
        betas, epsilon = list(config.adam_betas), config.adam_epsilon
        corrects = config.bias_correction
        return BlockwiseAdam(0.0, betas=betas, eps=epsilon, bias_correction=corrects)
    if config.optimizer == "sgd":
        return BlockwiseSGD(0.0, momentum=momentum, weight_decay=decay)
    if config.optimizer == "lion":
        return BlockwiseLion(0.0, betas=list(config.lion_betas), weight_decay=decay)
    return optim.Adafactor(0.0, scale_parameter=False, relative_step=False, weight_decay=decay)


def _adamw(config: TrainConfig) -> optim.Optimizer:
    return BlockwiseAdamW(
        learning_rate=0.0,
        betas=list(config.adam_betas),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        bias_correction=config.bias_correction,
    )


def _muon(config: TrainConfig) -> optim.Optimizer:
    return optim.Muon(0.0, momentum=config.momentum, weight_decay=config.weight_decay)
