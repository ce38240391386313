"""lm-evaluation-harness on our models: its tasks ask, our networks answer.

Needs the extra `harness` (package lm-eval). The harness imports the model's side from here, and
nothing here is imported before it is used:

    from lm_eval import simple_evaluate
    simple_evaluate(wb.harness_model(base), tasks=["arc_easy"], limit=50)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.errors import EvaluationError, check_whole
from workbench.models.loading import BaseModel

if TYPE_CHECKING:
    from lm_eval.api.model import LM


def harness_model(base: BaseModel, *, batch_size: int = 16) -> LM:
    """A loaded model as lm-evaluation-harness asks for it.

    Args:
        base: a loaded model, with its adapter if it has one.
        batch_size: rows that go through the network together, at most.

    Raises:
        EvaluationError: lm-eval is not installed.
    """
    check_whole("batch_size", batch_size, 1)
    try:
        from workbench.evaluation.harness_model import HarnessModel
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("lm_eval"):
            raise
        raise EvaluationError(
            "lm-evaluation-harness is not installed",
            cure="Install the extra: pip install 'mlx-lora-workbench[harness]'.",
        ) from None
    return HarnessModel(base, batch_size)
