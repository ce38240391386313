"""Does the network tell one order of the past from another?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np

from workbench.models.structure import module_at
from workbench.probes.findings import Finding, failed, not_applicable, passed
from workbench.probes.model_checks.attention import AttentionCall, attention_calls
from workbench.probes.model_checks.subject import Subject, difference
from workbench.probes.recording import recorded


def check_order(subject: Subject) -> Iterator[Finding]:
    """Heading "position order": attention tells one order of the past from another.

    Each attention module is called once more with its past reversed. Without positions, the
    output at the last token is a sum over a set, and does not change.
    """
    calls, same = attention_calls(subject), subject.tolerance
    if adds_positions(subject):
        yield _order_of_whole(subject, "positions are added to the embedded tokens")
    elif not calls:
        yield _order_of_whole(subject, "no attention module was found; other layers carry it")
    else:
        pasts = {found.path: _past_of(subject, found) for found in calls}
        reading = [found for found in calls if len(pasts[found.path]) > 1]
        blind = [f.path for f in reading if not sees_order(f, pasts[f.path], same)]
        yield from _order_of_modules(subject, len(reading), blind)


def _order_of_modules(subject: Subject, reading: int, blind: Sequence[str]) -> Iterator[Finding]:
    seeing = reading - len(blind)
    if not reading:
        yield not_applicable("position order", "attention reads no earlier tokens of its own")
    elif seeing:
        yield passed("position order", f"{seeing} attention modules see the order of tokens")
        if blind:
            yield not_applicable("position order", f"no positions in {', '.join(blind)}")
    elif not _holds_rope(subject, blind) and reading < len(getattr(subject.model, "layers", ())):
        yield _order_of_whole(subject, "attention has no positions; other layers carry them")
    else:
        yield failed(
            "position order",
            f"reversing the past changes nothing in any of {reading} attention modules "
            f"(first: {blind[0]})",
            "RoPE is missing, or rotates another axis than the sequence (heads before swapaxes)",
        )


def _order_of_whole(subject: Subject, why: str) -> Finding:
    tokens = subject.tokens()
    reversed_past = np.concatenate([tokens[:, -2::-1], tokens[:, -1:]], axis=1)
    before = subject.logits(tokens)
    moved = difference(subject.logits(reversed_past)[:, -1], before[:, -1])
    if moved > subject.tolerance:
        return passed("position order", f"{why}; reversing the past moves the last logits")
    return failed(
        "position order",
        "reversing the past does not move the last logits",
        "positions never reach attention: they are built, but not added or rotated",
    )


def adds_positions(subject: Subject) -> bool:
    """Whether positions come with the input: one token repeated enters the first layer unlike."""
    path = _first_layer(subject)
    if path is None:
        return False
    tokens = np.full((1, subject.length), subject.tokens()[0, 0])
    with recorded(subject.model, [path]) as heard:
        subject.call(tokens)
    entering = next((call.inputs for call in heard if call.inputs is not None), None)
    if entering is None or entering.ndim != 3:
        return False
    rows = np.array(entering.astype(mx.float32))[0]
    return difference(rows, np.broadcast_to(rows[:1], rows.shape)) > subject.tolerance


def _first_layer(subject: Subject) -> str | None:
    layers = getattr(subject.model, "layers", None)
    if isinstance(layers, list) and layers:
        return next(path for path, m in subject.model.named_modules() if m is layers[0])
    calls = attention_calls(subject)
    return calls[0].path if calls else None


def _past_of(subject: Subject, found: AttentionCall) -> list[int]:
    """Positions whose input moves the module's output at the last token."""
    inputs, same = found.call.inputs, subject.tolerance
    length, before = inputs.shape[1], found.again(inputs)[:, -1]
    if not subject.window or subject.window > length:  # all, or none
        # Some take their keys and values from another layer, or see only themselves.
        other = mx.concatenate([-inputs[:, :-1], inputs[:, -1:]], axis=1)
        reads = difference(found.again(other)[:, -1], before) > same
        return list(range(length - 1)) if reads else []
    flips = (mx.where(mx.arange(length)[:, None] == p, -inputs, inputs) for p in range(length - 1))
    moved = [difference(found.again(flipped)[:, -1], before) for flipped in flips]
    return [position for position, distance in enumerate(moved) if distance > same]


def sees_order(found: AttentionCall, past: Sequence[int], same: float) -> bool:
    """Whether reversing these past positions moves the module's output at the last token."""
    inputs = found.call.inputs
    order = np.arange(inputs.shape[1])
    order[list(past)] = order[list(past)][::-1]
    reordered = found.again(inputs[:, mx.array(order)])[:, -1]
    return difference(reordered, found.again(inputs)[:, -1]) > same


def _holds_rope(subject: Subject, paths: Sequence[str]) -> bool:
    modules = [module_at(subject.model, path) for path in paths]
    held = [{**vars(module), **module} for module in modules]
    return any(
        callable(value) and ("rope" in name or "rotary" in name)
        for names in held
        for name, value in names.items()
    )
