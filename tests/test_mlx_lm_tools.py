"""mlx-lm's own command line on what we write, and what it writes loaded here."""

import dataclasses
import json
import subprocess
import sys

import mlx.core as mx
import pytest

import workbench as wb
from tests.process import ROOT, run
from tests.toy import SPECIAL, conversation, save_toy_folder, write_jsonl
from tests.toy_adapters import CONFIG, TOKENS, randomise

QUESTION = "What is the capital of France?"
LOGITS = """
    import mlx.core as mx
    from mlx_lm.utils import load
    for adapter in {adapters!r}:
        model, _ = load({folder!r}, adapter_path=adapter)
        mx.save(adapter + "/logits.npy", model(mx.array({tokens!r})))
"""
TRAIN = """
    import sys
    from mlx_lm import lora
    for kind in ("lora", "dora"):
        sys.argv = ["lora", "--model", {folder!r}, "--train", "--data", {data!r}, "--iters", "3",
                    "--fine-tune-type", kind, "--batch-size", "1", "--num-layers", "2",
                    "--learning-rate", "0.01", "--adapter-path", {out!r} + "/" + kind]
        lora.main()
"""


def mlx_lm_generate(model, *options, max_tokens):
    """What `python -m mlx_lm generate` answers."""
    command = [sys.executable, "-m", "mlx_lm", "generate", "--model", str(model), *options]
    command += ["--prompt", QUESTION, "--max-tokens", str(max_tokens), "--verbose", "False"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    text = done.stdout.strip()
    for token in SPECIAL:  # which mlx-lm shows, and we do not
        text = text.replace(token, "")
    return text


def test_mlx_lm_answers_alike_from_a_fused_real_model(smollm2, tmp_path):
    wb.fuse(smollm2, tmp_path / "fused")
    answer = mlx_lm_generate(tmp_path / "fused", max_tokens=12)
    assert answer == wb.generate(smollm2, QUESTION, max_tokens=12)
    assert "Paris" in answer


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory):
    return save_toy_folder(tmp_path_factory.mktemp("toy") / "model")


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_mlx_lm_answers_alike_with_our_adapter(toy_folder, tmp_path, use_dora):
    base = wb.load_model(toy_folder)
    plain = wb.generate(base, QUESTION, max_tokens=16)
    wb.add_lora(base.model, dataclasses.replace(CONFIG, use_dora=use_dora))
    randomise(base.model, seed=3)
    wb.save_adapter(base, tmp_path)
    answer = wb.generate(base, QUESTION, max_tokens=16)
    assert answer != plain
    assert mlx_lm_generate(toy_folder, "--adapter-path", str(tmp_path), max_tokens=16) == (
        answer.strip()
    )


def test_an_adapter_that_mlx_lm_trained_loads_with_equal_logits(toy_folder, tmp_path):
    rows = [conversation("Capital of Peru?", "Lima."), conversation("And of Chile?", "Santiago.")]
    for split in ("train", "valid"):
        write_jsonl(tmp_path / f"{split}.jsonl", rows)
    trained = run(TRAIN.format(folder=str(toy_folder), data=str(tmp_path), out=str(tmp_path)))
    assert trained.code == 0, trained.err
    adapters = [str(tmp_path / kind) for kind in ("lora", "dora")]
    read = run(LOGITS.format(folder=str(toy_folder), adapters=adapters, tokens=TOKENS.tolist()))
    assert read.code == 0, read.err
    plain = wb.load_model(toy_folder).model(TOKENS)
    for adapter in adapters:
        base = wb.load_model(toy_folder)
        attached = wb.load_adapter(base, adapter)
        logits, expected = base.model(TOKENS), mx.load(f"{adapter}/logits.npy")
        assert mx.abs(logits - expected).max() <= 1e-5 * mx.abs(expected).max()
        assert mx.abs(plain - expected).max() > 1e-2
        config = json.loads((tmp_path / adapter / "adapter_config.json").read_text())
        assert attached.config.use_dora == (config["fine_tune_type"] == "dora")
