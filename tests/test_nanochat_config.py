"""The dimensions of a nanochat GPT: from a file or given in a cell, checked alike."""

import pytest

from tests.toy_nanochat import NANO_CONFIG
from workbench.errors import ConfigError
from workbench.models.nanochat_config import NanoChatConfig

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}


def test_what_is_not_said_has_nanochats_defaults():
    config = NanoChatConfig(**SIZES)
    assert (config.num_key_value_heads, config.intermediate_size, config.head_dim) == (4, 128, 8)
    assert (config.max_position_embeddings, config.rope_theta) == (2048, 10_000.0)
    assert config.model_type == "nanochat"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": "absent"}, "missing hidden_size"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"num_hidden_layers": 1 << 20}, "num_hidden_layers"),
        ({"num_attention_heads": 3, "num_key_value_heads": 3}, "num_attention_heads"),
        ({"num_attention_heads": 32, "num_key_value_heads": 32}, "head_dim must be even"),
        ({"num_key_value_heads": 3}, "4 query heads cannot share 3"),
        ({"rope_theta": 1}, "rope_theta"),
        ({"max_position_embeddings": -1}, "max_position_embeddings"),
    ],
    ids=str,
)
def test_impossible_dimensions_raise_from_a_file_and_in_a_cell(change, named):
    changed = {k: v for k, v in {**NANO_CONFIG, **change}.items() if v != "absent"}
    with pytest.raises(ConfigError, match=rf"config\.json.*{named}|NanoChatConfig.*{named}"):
        NanoChatConfig.from_dict(changed)
    if "absent" not in change.values():
        fields = {k: v for k, v in changed.items() if k in NanoChatConfig.__dataclass_fields__}
        with pytest.raises(ConfigError, match=rf"NanoChatConfig.*{named}"):
            NanoChatConfig(**fields)


@pytest.mark.parametrize(
    "change",
    [
        {"attention_bias": True},
        {"tie_word_embeddings": True},
        {"hidden_act": "gelu"},
        {"final_logit_softcapping": 30.0},
        {"head_dim": 16},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
    ],
    ids=str,
)
def test_what_a_nanochat_gpt_has_not_is_refused(change):
    key = next(iter(change)).replace("rope_scaling", "rope_type")
    key = key.replace("rope_parameters", "rope_type")
    with pytest.raises(ConfigError, match=f"{key} .*is not supported; a nanochat GPT has"):
        NanoChatConfig.from_dict({**NANO_CONFIG, **change})


def test_what_transformers_says_of_it_is_read():
    config = {
        **{key: value for key, value in NANO_CONFIG.items() if key != "rope_theta"},
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        "final_logit_softcapping": 15.0,
        "hidden_act": "relu2",
        "tie_word_embeddings": False,
        "attention_bias": False,
    }
    assert NanoChatConfig.from_dict(config).rope_theta == 5e5
