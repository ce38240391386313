"""Models and machines that the planner's tests plan for."""

from __future__ import annotations

from tests.toy import TOY_CONFIG
from workbench.probes.planner import plan_memory
from workbench.probes.planning.machine import Machine
from workbench.probes.planning.plan import MemoryPlan

GB = 10**9
ROOMY = Machine("a large CPU", 1000 * GB)
LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}
FOUR_LAYERS = {**LLAMA_8B, "num_hidden_layers": 4}  # as wide, and planned in less time
MODEL = {**TOY_CONFIG, "hidden_size": 64, "vocab_size": 1000, "num_hidden_layers": 4}
BASIC = {"micro_batch_size": 4, "length": 64}


def mac(size: int) -> Machine:
    """An Apple machine with `size` GB."""
    return Machine(f"Mac {size} GB", size * GB, gpu=True)


def planned(config: object = MODEL, machine: Machine = ROOMY, **settings: object) -> MemoryPlan:
    """A plan for 4 rows of 64 tokens, if nothing else is said."""
    return plan_memory(config, machine=machine, **{**BASIC, **settings})
