"""Pictures of slices and checks: their titles state what was measured; names are no formulas."""

from __future__ import annotations

import io
from unittest import mock

import matplotlib.image
import numpy as np
import pandas as pd
import pytest

from workbench.live import slicing

WORDS = ["<|im_start|>", "a $\\frac{$ b", "\n", " Lima", "."]


def titled(draw, *args) -> str:
    """The headline of a picture; the picture itself must have a transparent corner."""
    with mock.patch.object(slicing, "headline", wraps=slicing.headline) as headline:
        picture = draw(*args)
    pixels = matplotlib.image.imread(io.BytesIO(picture))
    assert pixels.shape[2] == 4
    assert pixels[0, 0, 3] == 0
    assert (pixels[..., 3] > 0).any()
    return headline.call_args.args[1]


def test_shift_counts_the_trained_targets():
    assert "2 of 4 targets" in titled(slicing.draw_shift, WORDS, [False, False, False, True, True])


def test_masks_count_targets_tokens_and_padding():
    mask = np.array([[False, True, True, False], [False, False, True, True]])
    title = titled(slicing.draw_masks, [WORDS[:3], WORDS[:4]], mask)
    assert "4 targets" in title
    assert "7 tokens" in title
    assert "1 are padding" in title


def test_causality_names_only_what_is_causal():
    good, bad = np.triu(np.ones((4, 4))), np.tril(np.ones((4, 4)))
    title = titled(slicing.draw_causality, {"good one": good, "bad one": bad})
    assert "good one" in title
    assert "bad one" not in title


def test_drift_names_only_what_is_rounding():
    title = titled(slicing.draw_drift, {"right": [0.0, 1e-6], "wrong": [0.0, 0.3]}, 3e-5)
    assert "right" in title
    assert "wrong" not in title


def test_positions_are_drawn():
    titled(slicing.draw_positions, [1, 2], [0.2, 0.3], [0.0, 1e-6], 3e-5)


@pytest.mark.parametrize("caught", [1, 2])
def test_mutants_that_slip_through_are_counted(caught):
    table = pd.DataFrame(
        {
            "bug": ["1. shift", "2. mask"],
            "mutant": ["first", "second $\\frac{$"],
            "check": ["shift", "causality"],
            "caught": [True, caught == 2],
            "also under": ["", "cache, batch"],
        }
    )
    assert f"{caught} of 2" in titled(slicing.draw_mutants, table)
