"""What is measured: the workloads, the peers that do them, and the settings that are ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from workbench.errors import ConfigError

OURS = "ours"
MLX_LM = "mlx-lm"  # as its wheel comes
MLX_LM_BLAS = "mlx-lm + same BLAS"
TORCH = "torch + PEFT float32"
TORCH_BF16 = "torch + PEFT bfloat16"
PEERS = (OURS, MLX_LM_BLAS, TORCH, TORCH_BF16, MLX_LM)

SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CHAT_ROWS = 48  # of the capitals: 16 of them in three phrasings

# What is switched on for our trainer by hand; all else that pays, it finds by itself.
OUR_SETTINGS: dict[str, dict[str, object]] = {"W4b": {"grad_checkpoint": True}}


@dataclass(frozen=True)
class Workload:
    """One piece of work that every peer does alike."""

    name: str
    title: str  # with {rows} and {length} where they stand
    peers: tuple[str, ...]
    kind: str = "text"  # "text": rows of `length` inputs, all supervised; "chat"; or "serve"
    rows: int = 4  # that are trained
    batch_size: int = 4  # rows of a step
    length: int = 256  # inputs of a text row; of W5, tokens of an answer
    epochs: int = 1  # times that every row is used
    targets: tuple[str, ...] = SEVEN  # of a LoRA adapter of rank 8
    num_layers: int | None = None  # the last N; None: all
    head_only: bool = False  # an untied lm_head trains, and there is no adapter
    learning_rate: float = 5e-4
    grad_checkpoint: bool = False
    most_steps: Mapping[str, int] = field(default_factory=dict)  # of a peer that is very slow

    @property
    def heading(self) -> str:
        """Name and title, with the numbers as they are."""
        return f"{self.name}: {self.title.format(rows=self.rows, length=self.length)}"


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            "W1",
            "{rows} × {length} tokens, all supervised, LoRA on q and v",
            (OURS, MLX_LM_BLAS, TORCH, TORCH_BF16, MLX_LM),
            epochs=3,
            targets=("q_proj", "v_proj"),
            most_steps={MLX_LM: 1, TORCH_BF16: 1},  # bfloat16 is for comparison only
        ),
        Workload(
            "W2",
            "chat, prompt masked, batch 8, LoRA on seven projections, one epoch",
            (OURS, MLX_LM_BLAS, TORCH, MLX_LM),
            kind="chat",
            rows=CHAT_ROWS,
            batch_size=8,
            most_steps={MLX_LM: 1},
        ),
        Workload(
            "W3a",
            "chat, last 4 layers only, five epochs",
            (OURS, MLX_LM_BLAS, TORCH),
            kind="chat",
            rows=CHAT_ROWS // 3,
            batch_size=8,
            epochs=5,
            num_layers=4,
        ),
        Workload(
            "W3b",
            "chat, head only, five epochs",
            (OURS, MLX_LM_BLAS, TORCH),
            kind="chat",
            rows=CHAT_ROWS // 3,
            batch_size=8,
            epochs=5,
            head_only=True,
            learning_rate=1e-4,
        ),
        Workload(
            "W4a",
            "{rows} × {length} tokens, LoRA on q and v",
            (OURS, MLX_LM_BLAS),
            rows=1,
            batch_size=1,
            length=2048,
            targets=("q_proj", "v_proj"),
        ),
        Workload(
            "W4b",
            "{rows} × {length} tokens with gradient checkpointing",
            (OURS, MLX_LM_BLAS),
            rows=1,
            batch_size=1,
            length=2048,
            targets=("q_proj", "v_proj"),
            grad_checkpoint=True,
        ),
        Workload(
            "W5",
            "loading, and greedy generation of {length} tokens",
            (OURS, MLX_LM_BLAS, TORCH),
            kind="serve",
            length=64,
        ),
    )
}


def chosen(names: list[str] | tuple[str, ...]) -> list[Workload]:
    """Workloads by name; a name such as W3 stands for all that begin with it.

    Raises:
        ConfigError: a name that no workload begins with.
    """
    found = []
    for name in names:
        fitting = [w for key, w in WORKLOADS.items() if key.startswith(name) and name]
        if not fitting:
            raise ConfigError(f"no workload {name!r}", cure=f"There are {', '.join(WORKLOADS)}.")
        found += [workload for workload in fitting if workload not in found]
    return found
