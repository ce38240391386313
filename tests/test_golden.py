"""Logits against Hugging Face transformers, from a committed file (tests/golden/make_golden.py)."""

from pathlib import Path

import mlx.core as mx
import pytest

GOLDEN = Path(__file__).parent / "golden" / "smollm2_logits.safetensors"


@pytest.mark.parametrize("prompt", [0, 1, 2])
def test_logits_equal_those_of_transformers(smollm2, prompt):
    golden = mx.load(str(GOLDEN))
    logits = smollm2.model(golden[f"tokens_{prompt}"][None])[0]
    expected = golden[f"logits_{prompt}"]
    difference = mx.abs(logits[:, golden["vocab_ids"]] - expected).max() / mx.abs(expected).max()
    assert difference.item() <= 1e-4
    assert mx.array_equal(mx.argmax(logits, axis=-1), golden[f"argmax_{prompt}"])
