"""Does training work here? A toy Llama learns for two steps."""

from __future__ import annotations

import math

from workbench.data.text_tokenizers import make_tokenizer
from workbench.data.texts import Corpus, text_dataset
from workbench.doctor.records import FAILS, OK, Record, Settings
from workbench.models.llama_config import LlamaConfig
from workbench.probes.parameters import changed, fingerprint
from workbench.tuning.config import TrainConfig
from workbench.tuning.lora import LoRAConfig, add_lora
from workbench.tuning.pretraining import fresh_model
from workbench.tuning.trainer import Trainer

TOY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
}
TEXT = "She sells sea shells on the sea shore. " * 4
STEPS = 2  # lora_a gets no gradient at the first: lora_b is zero


def check_training(settings: Settings) -> Record:
    """Two steps of LoRA: the loss is finite, every adapter tensor moved, and nothing else did."""
    corpus = Corpus("a tongue twister", train=TEXT, held_out=TEXT)
    tokenizer = make_tokenizer("bytes", corpus.train)
    config = LlamaConfig.from_dict({**TOY, "vocab_size": len(tokenizer)})
    base = fresh_model(config, tokenizer, seed=0)
    add_lora(base.model, LoRAConfig(rank=2))
    data = text_dataset(corpus, tokenizer, TOY["max_position_embeddings"])
    before = fingerprint(base.model)
    trainer = Trainer(base, data, TrainConfig(steps=STEPS, weight_decay=0.0))
    losses = [report.loss for report in trainer]
    moved = set(changed(before, fingerprint(base.model)))
    adapter = {name for name in before if name.endswith(("lora_a", "lora_b"))}
    if not all(map(math.isfinite, losses)) or len(losses) != STEPS:
        return Record("training", FAILS, f"losses of a toy Llama: {losses}")
    if moved != adapter:
        names = ", ".join(sorted(moved ^ adapter)[:3])
        return Record(
            "training", FAILS, f"of the adapter and all else, wrongly moved or not: {names}"
        )
    seen = f"{STEPS} steps of a toy Llama: loss {losses[0]:.3f} → {losses[-1]:.3f}"
    return Record("training", OK, f"{seen}; {len(moved)} adapter tensors moved, nothing else")
