"""What is handed in instead of the right thing is named; what is handed back reads in a line."""

import pytest

import workbench as wb
from tests.toy import conversation, toy_dataset
from workbench.errors import ConfigError

ROWS = [conversation("Hi", "Hello!")]
ASIDE = {  # a call with what lies beside the right thing: what the error says
    "the network, to generate": (lambda b: wb.generate(b.model, "Hi"), "base must be a BaseModel"),
    "the network, to stream": (lambda b: next(wb.stream(b.model, "Hi")), "got Llama. Give what"),
    "the network, to score": (lambda b: wb.log_likelihood(b.model, [("a", "b")]), "got Llama"),
    "the network, for perplexity": (
        lambda b: wb.perplexity(b.model, toy_dataset([5])),
        "got Llama",
    ),
    "the network, to save": (lambda b: wb.save_adapter(b.model, "x"), "got Llama"),
    "the network, to load into": (lambda b: wb.load_adapter(b.model, "x"), "got Llama"),
    "the network, to fuse": (lambda b: wb.fuse(b.model, "x"), "not its .model"),
    "the network, for a GGUF": (lambda b: wb.export_gguf(b.model, "x.gguf"), "got Llama"),
    "the network, for suites": (lambda b: wb.run_suites(b.model, "x"), "got Llama"),
    "the network, to train": (lambda b: wb.Trainer(b.model, toy_dataset([5])), "got Llama"),
    "rows, to train on": (lambda b: wb.Trainer(b, ROWS), "data must be a Dataset, got list"),
    "a mapping, as settings": (
        lambda b: wb.Trainer(b, toy_dataset([5]), {"steps": 3}),
        "config must be a TrainConfig, got dict",
    ),
    "the base, for an adapter": (lambda b: wb.add_lora(b), "Give a network, such as base.model"),
    "a mapping, for an adapter": (
        lambda b: wb.add_lora(b.model, {"rank": 4}),
        "config must be a LoRAConfig, got dict",
    ),
    "the base, to save weights": (lambda b: wb.save_weights(b, "x"), "such as base.model"),
    "the base, to load weights": (lambda b: wb.load_weights(b, "x"), "such as base.model"),
    "the base, for a mode": (lambda b: wb.set_trainable(b, "full"), "such as base.model"),
    "the base, for rows": (lambda b: wb.load_dataset(ROWS, b), "got BaseModel. Give the model's"),
    "the base, for pairs": (lambda b: wb.load_preferences(ROWS, b), "base.tokenizer"),
    "nothing, for a stream": (lambda b: wb.stream_dataset("x.jsonl", None), "got NoneType"),
}


@pytest.mark.parametrize("what", ASIDE)
def test_a_wrong_kind_of_argument_is_named_with_the_right_one(base, what):
    call, message = ASIDE[what]
    with pytest.raises(ConfigError, match=message):
        call(base)


def test_a_model_reads_in_a_line(base):
    assert repr(base) == str(base) == f"toy: llama; {base.report}"


def test_an_adapter_and_a_mode_read_in_a_line(base):
    assert repr(wb.add_lora(base.model)).startswith("LoRA rank 8, scale 2 on 14 modules: ")
    assert repr(wb.set_trainable(base.model, "full")).startswith("full: 20 tensors, ")
