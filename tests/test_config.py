"""Every bad setting is refused by name."""

import math

import pytest

from workbench.errors import ConfigError
from workbench.tuning.config import TrainConfig

NOT_WHOLE = (-1, 1.5, True, "3", math.nan)
NOT_NUMBERS = (-1e-9, math.nan, math.inf, 10**400, True, "1", None)
BAD_SETTINGS = [
    *[(name, value) for name in ("epochs", "steps", "micro_batch_size", "grad_accum_steps")
      for value in (0, *NOT_WHOLE)],
    *[(name, value) for name in ("warmup_steps", "valid_every", "cache_limit_bytes", "seed")
      for value in NOT_WHOLE],
    *[(name, value) for name in ("learning_rate", "min_learning_rate", "max_grad_norm",
                                 "weight_decay", "adam_epsilon") for value in NOT_NUMBERS],
    *[("adam_betas", value) for value in (None, (0.9,), (0.9, 1.0), (-0.1, 0.9), ("a", "b"),
                                          (math.nan, 0.9))],
    *[("schedule", value) for value in ("step", None, 3)],
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD_SETTINGS, ids=lambda part: str(part)[:20])
def test_a_bad_setting_raises_and_is_named(name, value):
    with pytest.raises(ConfigError, match=name):
        TrainConfig(**{name: value})


def test_a_floor_above_the_largest_rate_is_refused():
    assert TrainConfig(learning_rate=1e-3, min_learning_rate=1e-3).min_learning_rate == 1e-3
    with pytest.raises(ConfigError, match=r"min_learning_rate 0.002 is above learning_rate 0.001"):
        TrainConfig(learning_rate=1e-3, min_learning_rate=2e-3)
