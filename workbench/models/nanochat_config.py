"""A nanochat GPT's dimensions, read from config.json or given, and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from workbench.models.config_checks import (
    LARGEST,
    check_head_dim,
    check_heads,
    check_numbers,
    check_only,
    check_theta,
    read_rope,
)
from workbench.models.rope import rope_kind

LOGIT_SOFTCAP = 15.0  # logits stay within ± this
REQUIRED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
)
NEEDED = tuple(key for key in REQUIRED if key != "intermediate_size")  # of whoever makes one
WHERE = "config.json"
ONLY = {  # what a config.json may say, and the network has in its code
    "hidden_act": "relu2",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1,
    "rope_type": "default",
    "tie_word_embeddings": False,
    "final_logit_softcapping": LOGIT_SOFTCAP,
}


@dataclass(frozen=True)
class NanoChatConfig:
    """A nanochat GPT's dimensions, under the names that mlx-lm reads.

    Raises:
        ConfigError: a number is impossible, or two do not fit together.
    """

    hidden_size: int  # features of a token's hidden state
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int  # rows of the embedding, and of the head
    num_key_value_heads: int | None = None  # default: as many as there are query heads
    intermediate_size: int | None = None  # inside the feed-forward layer; default 4 · hidden_size
    max_position_embeddings: int = 2048  # tokens
    rope_theta: float = 10_000.0
    model_type: str = "nanochat"

    def __post_init__(self):
        where = type(self).__name__
        check_numbers(vars(self), NEEDED, where)
        for name, default in (
            ("num_key_value_heads", self.num_attention_heads),
            ("intermediate_size", 4 * self.hidden_size),
            ("max_position_embeddings", 2048),
        ):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        object.__setattr__(self, "rope_theta", check_theta(self.rope_theta, where))
        check_heads(self, where)

    @classmethod
    def from_dict(cls, config: Mapping[str, object]) -> NanoChatConfig:
        """Read a config.json as mlx-lm's nanochat does, whose norms have an epsilon of 1e-5.

        What it says of rms_norm_eps is not used, there or here.

        Raises:
            ConfigError: a needed key is missing, a number is impossible, or the network is to
                have something that a nanochat GPT has not.
        """
        check_numbers(config, REQUIRED, WHERE)
        head_dim = check_head_dim(config["hidden_size"], config["num_attention_heads"], WHERE)
        rope = read_rope(config, WHERE)
        said = {**config, "rope_type": rope_kind(rope["rope_scaling"])}
        check_only(said, {**ONLY, "head_dim": head_dim}, "a nanochat GPT", WHERE)
        sizes = {key: config.get(key) for key in cls.__dataclass_fields__ if key in LARGEST}
        return cls(**sizes, rope_theta=rope["rope_theta"])

    @property
    def head_dim(self) -> int:
        """Features of a head."""
        return check_head_dim(self.hidden_size, self.num_attention_heads, type(self).__name__)

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the head is the embedding: never."""
        return False

    @property
    def final_logit_softcapping(self) -> float:
        """Bound of the logits."""
        return LOGIT_SOFTCAP
