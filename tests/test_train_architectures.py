"""Every architecture trains: the loss falls, the adapter moves, and nothing else does."""

import dataclasses
import itertools
import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchLinear

import workbench as wb
from tests.architecture_settings import COMMON
from tests.architectures import ARCHITECTURES
from tests.toy import VOCAB_SIZE, conversation, toy_dataset, toy_tokenizer, write_jsonl
from tests.toy_architectures import small_base, small_rows
from workbench.data.batches import collate
from workbench.data.datasets import Dataset
from workbench.models.loading import save_weights
from workbench.probes.parameters import changed, fingerprint
from workbench.probes.training import check_training
from workbench.tuning.config import TrainConfig
from workbench.tuning.lora import LoRAConfig, adapter_disabled, add_lora
from workbench.tuning.trainer import Trainer
from workbench.tuning.update import accumulate

STEPS = 5
QUICK = ["qwen2", "qwen3", "gemma2", "gemma3_text", "gemma4_text", "phi3", "mistral", "olmo2"]
QUICK += ["gpt2", "gpt_neox", "gptj", "openelm", "plamo", "talkie", "mixtral", "deepseek_v3"]
QUICK += ["dbrx", "gpt_oss", "mamba2", "qwen3_next", "lfm2", "falcon_h1", "recurrent_gemma"]
DATA = Dataset("toy", small_rows([7, 12, 5, 9]), [])
TOKENS = mx.array(collate(DATA.train, range(4)).tokens)


@pytest.fixture(scope="module", autouse=True)
def _without_compilation():
    mx.disable_compile()
    yield
    mx.enable_compile()


def trainer_of(name: str) -> Trainer:
    base = small_base(name)
    add_lora(base.model, LoRAConfig(rank=4))
    config = TrainConfig(
        steps=STEPS, micro_batch_size=4, learning_rate=5e-3, schedule="constant", weight_decay=0.0
    )
    return Trainer(base, DATA, config)


def quick_or_long(names: list[str]) -> list:
    """All architectures: those named at every test run, the others in the long one."""
    return [n if n in names else pytest.param(n, marks=pytest.mark.long) for n in ARCHITECTURES]


@pytest.mark.parametrize("name", quick_or_long(QUICK))
@pytest.mark.filterwarnings("ignore:logits at every position of a Model:UserWarning")  # talkie's
def test_five_steps_lower_the_loss_and_move_the_adapter_only(name):
    trainer = trainer_of(name)
    model, before = trainer.model, fingerprint(trainer.model)
    with adapter_disabled(model):
        logits = np.array(model(TOKENS))
    batch = collate(DATA.train, range(4))
    received = [n for n, _ in tree_flatten(accumulate(model, trainer.loss_fn, [batch], 0)[1])]
    losses = [report.loss for report in trainer]
    assert all(later < earlier for earlier, later in itertools.pairwise(losses)), losses
    adapter = {name for name in before if name.endswith(("lora_a", "lora_b"))}
    assert set(received) == adapter
    assert set(changed(before, fingerprint(model))) == adapter
    with adapter_disabled(model):
        assert np.array_equal(model(TOKENS), logits)


@pytest.mark.parametrize("name", quick_or_long(["qwen3", "gpt2", "mixtral", "mamba2"]))
@pytest.mark.filterwarnings("ignore:logits at every position of a Model:UserWarning")  # talkie's
def test_the_checks_of_training_pass(name):
    trainer = trainer_of(name)
    report = check_training(
        trainer.model, trainer.loss_fn, collate(DATA.train, range(4)), mode="lora"
    )
    failures = "\n".join(map(str, report.failures))
    if name == "phimoe":  # SparseMixer's router gets no gradient where it is sure of an expert
        assert failures.count(".lora_") == failures.count("block_sparse_moe.gate.lora_") > 0
    else:
        assert report.ok, report


@pytest.mark.parametrize(("name", "stacks"), [("mixtral", 6), ("dbrx", 0), ("deepseek_v3", 3)])
def test_an_adapter_says_which_experts_stay_frozen(name, stacks):
    base = small_base(name)
    adapter = add_lora(base.model, LoRAConfig(rank=2))
    stacked = {p for p, m in base.model.named_modules() if isinstance(m, SwitchLinear)}
    assert set(adapter.expert_names) == stacked
    assert len(stacked) == stacks
    assert not stacked & set(adapter.module_names)
    assert (f"{stacks} stacks of experts stay frozen" in str(adapter)) is (stacks > 0)


def test_quantised_experts_are_named_too():
    base = small_base("mixtral")
    nn.quantize(base.model, group_size=32, bits=4)
    assert len(add_lora(base.model, LoRAConfig(rank=2)).expert_names) == 6


def save_folder(name: str, folder: Path) -> Path:
    """A model folder of the architecture, with random weights and the toy tokenizer."""
    architecture = ARCHITECTURES[name]
    settings = {**architecture.settings, "vocab_size": VOCAB_SIZE}
    config = {"model_type": architecture.module, **COMMON, **settings, "eos_token_id": 2}
    # transformers reads the tokenizer's folder, and takes whole numbers only
    config = {k: int(v) if k == "query_pre_attn_scalar" else v for k, v in config.items()}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_weights(
        dataclasses.replace(architecture, settings=settings).build(seed=2),
        folder / "model.safetensors",
    )
    toy_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "gpt_neox", "mamba2", "qwen3_moe"])
def test_a_folder_loads_learns_an_answer_and_gives_it(name, tmp_path):
    folder = save_folder(name, tmp_path / "model")
    base = wb.load_model(folder)
    rows = write_jsonl(tmp_path / "rows.jsonl", [conversation("a?", "yes")])
    wb.add_lora(base.model, wb.LoRAConfig(rank=8))
    config = wb.TrainConfig(steps=25, micro_batch_size=1, learning_rate=1e-2)
    list(wb.Trainer(base, wb.load_dataset(rows, base.tokenizer), config))
    assert wb.generate(base, "a?", max_tokens=5) == "yes"
    wb.save_adapter(base, tmp_path / "adapter")
    again = wb.load_model(folder)
    assert wb.generate(again, "a?", max_tokens=5) != "yes"
    wb.load_adapter(again, tmp_path / "adapter")
    assert wb.generate(again, "a?", max_tokens=5) == "yes"


def test_a_network_that_mlx_lm_leaves_half_made_is_whole_when_loaded(tmp_path):
    base = wb.load_model(save_folder("recurrent_gemma", tmp_path / "model"))
    wb.add_lora(base.model, wb.LoRAConfig(rank=4))
    data = toy_dataset([7, 12, 5, 9])
    losses = [r.loss for r in wb.Trainer(base, data, wb.TrainConfig(steps=3, micro_batch_size=4))]
    assert losses[-1] < losses[0]
