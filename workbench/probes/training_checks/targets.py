"""What the loss trains: the right token, the right positions, all with the same weight."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from workbench.probes.findings import Finding, failed, not_applicable, passed
from workbench.probes.training_checks.logits import Reading
from workbench.probes.training_checks.subject import Rows

SAME = 1e-3  # relative difference of weights that is rounding
SAME_IF_NOT_PLAIN = 0.2  # such as with label smoothing: weights are read roughly
EITHER = "sum or mean"  # of a single target
FARTHEST = 4  # places to the left at which a target is looked for

SHIFT_CAUSES = {
    0: "there is no shift: train logits[:, :-1] against tokens[:, 1:]",
    2: "the shift is applied twice, or by two: shift once, in the loss or in the data",
    -1: "the shift goes the wrong way: train logits[:, :-1] against tokens[:, 1:]",
}


def check_shift(batches: Sequence[Rows], readings: Sequence[Reading]) -> Finding:
    """Heading "shift": the target at position t is the token at t + 1."""
    total = sum(len(reading.rows) for reading in readings)
    if not total:
        return not_applicable("shift", "the loss trains no position")
    counts = _distances(batches, readings)
    if counts[1] == total:
        rivals = [s for s, count in counts.items() if count == total and s != 1]
        if rivals:
            return not_applicable(
                "shift",
                f"the tokens repeat: {rivals[0]} places on stands the "
                "same token as one place on; check a batch of distinct tokens",
            )
        return passed("shift", f"all {total} trained positions t have the token at t + 1 as target")
    where, row, position, target = _first_wrong(batches, readings)
    first = f"first in {where}row {row} at position {position} (target {target})"
    distance, count = max(counts.items(), key=lambda item: (item[1], item[0] == 1), default=(1, 0))
    if distance != 1 and count > total / 2:
        moved = next((reading.lag for reading in readings if reading.lag), 0)
        own = f"; the model itself moves its logits by {moved}" if moved else ""
        cause = SHIFT_CAUSES.get(distance, "tokens and targets are sliced differently")
        if moved:
            cause = "model and loss both shift: let the model return logits for every position"
        detail = (
            f"{count} of {total} trained positions t have the token at t + {distance} as target"
        )
        return failed("shift", f"{detail}, {first}{own}", cause)
    return failed(
        "shift",
        f"{total - counts[1]} of {total} trained positions have another target than the next "
        f"token, {first}",
        "the targets are not the batch's own tokens, or rows are mixed up",
    )


def _distances(batches: Sequence[Rows], readings: Sequence[Reading]) -> Counter:
    """For each distance s: trained positions t whose target stands at t + s."""
    counts: Counter = Counter()
    for batch, reading in zip(batches, readings):
        length = batch.tokens.shape[1]
        for distance in range(-FARTHEST, length):
            places = reading.positions + distance
            inside = (places >= 0) & (places < length)
            there = batch.tokens[reading.rows[inside], places[inside]]
            counts[distance] += int((there == reading.targets[inside]).sum())
    return counts


def _first_wrong(batches: Sequence[Rows], readings: Sequence[Reading]) -> tuple[str, int, int, int]:
    for number, (batch, reading) in enumerate(zip(batches, readings)):
        where = f"micro-batch {number}, " if len(batches) > 1 else ""
        for row, t, target in zip(reading.rows, reading.positions, reading.targets):
            if t + 1 >= batch.tokens.shape[1] or batch.tokens[row, t + 1] != target:
                return where, int(row), int(t), int(target)
    raise AssertionError("every target is the next token")


def check_mask(batches: Sequence[Rows], readings: Sequence[Reading]) -> Iterator[Finding]:
    """Headings "mask" and "padding": the trained tokens are those of loss_mask[:, 1:], no more."""
    many, counts, places = len(batches) > 1, Counter(), {}
    causes = {"mask": [], "padding": []}
    for number, (batch, reading) in enumerate(zip(batches, readings)):
        trained, padding = reading.trained(batch.tokens.shape), batch.padding
        extra = trained & ~batch.expected
        faults = {
            "missing": batch.expected & ~trained,
            "extra": extra & ~padding,
            "padding": extra & padding,
        }
        counts += Counter(expected=batch.num_tokens, trained=int(trained.sum()))
        for kind, found in faults.items():
            counts[kind] += int(found.sum())
            for row, position in np.argwhere(found)[:1]:
                where = f"micro-batch {number}, row {row}" if many else f"row {row}"
                places.setdefault(kind, f"{where} at position {position}")
        if faults["missing"].any() or faults["extra"].any():
            causes["mask"].append(_mask_cause(batch, trained))
        if faults["padding"].any():
            causes["padding"].append(_padding_cause(batch, faults["padding"]))
    detail = f"{counts['expected']} targets expected, {counts['trained']} trained"
    wrong = [f"{counts[k]} {k}, first {places[k]}" for k in ("missing", "extra") if counts[k]]
    if wrong:
        yield failed("mask", f"{detail}: {'; '.join(wrong)}", causes["mask"][0])
    else:
        yield passed("mask", detail)
    if counts["padding"]:
        says = f"{counts['padding']} padding targets are trained, first {places['padding']}"
        yield failed("padding", says, causes["padding"][0])
    elif any(batch.padding.any() for batch in batches):
        amount = sum(int(batch.padding.sum()) for batch in batches)
        yield passed("padding", f"none of {amount} padding positions is a target")
    else:
        yield not_applicable("padding", "no row is padded; check a batch of unequal lengths")


def _mask_cause(batch: Rows, trained: np.ndarray) -> str:
    if not trained.any():
        return "no gradient reaches the logits: a stop_gradient, or a mask that is all False"
    late = np.zeros_like(batch.loss_mask)
    late[:, 1:] = batch.loss_mask[:, :-1]
    if (trained == late).all():
        return "the mask is not shifted with the targets: use loss_mask[:, 1:]"
    if not (trained & batch.expected).any():
        return "the mask is turned round: True must mean that a token is a target"
    if (batch.expected & ~trained).any():
        return "targets are cut off or masked: multiply the losses by loss_mask[:, 1:], once"
    return "tokens that are no targets are trained, such as the prompt: use loss_mask[:, 1:]"


def _padding_cause(batch: Rows, extra: np.ndarray) -> str:
    before = np.zeros_like(batch.padding)
    before[:, 1:] = batch.padding[:, :-1]
    if not (extra & before).any():
        return (
            "the mask ends one place late, so that each padded row trains the first padding "
            "token: mlx-lm's default_loss does (`steps <= lengths`); use `steps < lengths`"
        )
    return "padding is counted in the loss: multiply the losses by loss_mask[:, 1:]"


def check_reduction(batches: Sequence[Rows], readings: Sequence[Reading]) -> Finding:
    """Heading "reduction": all targets weigh the same, 1 (a sum) or 1 / targets (a mean)."""
    kinds = {}
    for number, (batch, reading) in enumerate(zip(batches, readings)):
        if not len(reading.weights):
            return not_applicable("reduction", "the loss trains no position")
        where = f"micro-batch {number}: " if len(batches) > 1 else ""
        kind, detail, cause = _kind(batch, reading)
        if kind is None:
            return failed("reduction", where + detail, cause)
        kinds[kind] = detail
    if len(kinds.keys() - {EITHER}) > 1:
        return failed(
            "reduction",
            "some micro-batches are summed, some averaged",
            "divide by the number of targets once, after summing over micro-batches",
        )
    if len(batches) == 1:
        return passed("reduction", *kinds.values())
    kind = next((kind for kind in kinds if kind != EITHER), EITHER)
    return passed("reduction", f"{len(batches)} micro-batches: in each, a {kind} over its targets")


def reduction_of(batch: Rows, reading: Reading) -> str | None:
    """How the loss reduces: "sum", "mean" or "sum or mean" (one target); None: neither."""
    return _kind(batch, reading)[0] if len(reading.weights) else None


def _kind(batch: Rows, reading: Reading) -> tuple[str | None, str, str]:
    weights, count = reading.weights, len(reading.weights)
    same = SAME if reading.is_plain else SAME_IF_NOT_PLAIN
    low, high = weights.min(), weights.max()
    if high < 0:
        cause = "the loss falls as the targets get less likely: its sign is turned round"
        return None, f"targets weigh {low:.4g} to {high:.4g}", cause
    if high - low > same * high:
        return None, f"targets weigh from {low:.4g} to {high:.4g}", _uneven_cause(reading, same)
    weight = float(weights.mean())
    if count == 1 and abs(weight - 1) <= same:
        return EITHER, "the only target weighs 1", ""
    if abs(weight - 1) <= same:
        return "sum", f"a sum: each of {count} targets weighs 1", ""
    if abs(weight * count - 1) <= same:
        return "mean", f"a mean: each of {count} targets weighs 1/{count}", ""
    return (
        None,
        f"each target weighs {weight:.4g}: neither 1 nor 1/{count}",
        _divisor(batch, weight),
    )


def _uneven_cause(reading: Reading, same: float) -> str:
    rows = {row: reading.weights[reading.rows == row] for row in set(reading.rows.tolist())}
    if any(np.ptp(weights) > same * abs(weights).max() for weights in rows.values()):
        return "positions of one row weigh differently: look at what multiplies the losses"
    products = [weights[0] * len(weights) for weights in rows.values()]
    if np.ptp(products) <= same * max(products):
        return (
            "a mean of row means: targets of short rows count more; sum over all rows, then "
            "divide by the number of targets"
        )
    return "rows weigh differently: sum over all rows, then divide by the number of targets"


def _divisor(batch: Rows, weight: float) -> str:
    rows, length = batch.tokens.shape
    names = {
        rows * (length - 1): "all positions, padding and prompt included",
        rows * length: "all tokens, padding and prompt included",
        rows: "the number of rows",
    }
    divisor = 1 / weight
    for number, name in names.items():
        if abs(divisor - number) <= SAME * number:
            return f"the sum is divided by {number}, {name}: divide by the number of targets"
    return "divide the sum by the number of targets, once"
