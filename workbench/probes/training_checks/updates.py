"""What a few updates do: who moves, who stays, and what is left unevaluated."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map

from workbench.probes.findings import Finding, failed, not_applicable, passed
from workbench.probes.parameters import changed, fingerprint
from workbench.probes.training_checks.gradients import zeros
from workbench.probes.training_checks.subject import Training, UserCodeError, described, shown

UPDATES = 3
LEARNING_RATE = 1e-3  # of the updates that the check makes itself
ENDS = ("lora_a", "lora_b")


@dataclass(frozen=True)
class Pending:
    """Operations that wait to be evaluated after one call of `step`."""

    parameters: int
    state: int
    loss: int
    total: int  # counted once where they share some


@dataclass(eq=False)
class Updates:
    """Before and after `UPDATES` calls of `step`."""

    trainable: set[str]
    before: dict[str, str]  # fingerprints of all parameters
    adapter: list[dict[str, mx.array]] = field(default_factory=list)  # before, after 1, 2, 3
    pending: list[Pending] = field(default_factory=list)  # after 1, 2, 3
    state_before: dict[str, mx.array] = field(default_factory=dict)
    state_after: dict[str, mx.array] = field(default_factory=dict)
    after: dict[str, str] = field(default_factory=dict)
    optimizer: object = None
    uses_moments: bool = True  # whether an update differs without the moments before it

    @property
    def moved(self) -> set[str]:
        """Names of the parameters whose bytes changed."""
        return set(changed(self.before, self.after))


def make_updates(training: Training) -> Updates:
    """Call `step` a few times and note what happens; nothing is evaluated on the way.

    Raises:
        UserCodeError: the step raised, or there is no gradient to make one with.
    """
    step, optimizer = training.step, training.optimizer
    if step is None:
        step, optimizer = _own_step(training)
    model = training.model
    found = Updates(set(training.trainable), fingerprint(model), optimizer=optimizer)
    found.state_before = _state(optimizer)
    mx.eval(found.state_before)
    found.adapter.append(_adapter(model))
    for number in range(1, UPDATES + 1):
        try:
            loss = step(training.given)
        except Exception as error:
            raise UserCodeError(f"call {number} of step raised {described(error)}") from error
        found.pending.append(_pending(model, optimizer, loss))
        found.adapter.append(_adapter(model))
    found.state_after = _state(optimizer)
    mx.eval(found.state_after)
    found.after = fingerprint(model)
    found.uses_moments = _uses_moments(training, step, optimizer)
    return found


def _uses_moments(training: Training, step: Callable, optimizer: object) -> bool:
    """Make one more update twice, with the moments as they are and without."""
    state, weights = getattr(optimizer, "state", {}), training.model.parameters()
    if not _moments(optimizer, _state(optimizer)):
        return True
    results = []
    for keep in (1, 0):
        training.model.update(weights)
        optimizer.state = tree_map(lambda a, k=keep: a * k if _is_moment(a) else a, state)
        try:
            step(training.given)
        except Exception:  # a trainer may have made all of its steps
            return True
        results.append([a for _, a in tree_flatten(training.model.trainable_parameters())])
        mx.eval(results)
    return not all(mx.array_equal(*pair).item() for pair in zip(*results))


def _own_step(training: Training) -> tuple[Callable, optim.Optimizer]:
    """nn.value_and_grad, AdamW and one evaluation: the step that is right."""
    model = training.model
    optimizer = training.optimizer or optim.AdamW(LEARNING_RATE, bias_correction=True)

    def total() -> mx.array:
        return sum(training.loss(rows) for rows in training.batches)

    loss_and_gradients = nn.value_and_grad(model, total)

    def step(_: object) -> mx.array:
        loss, gradients = loss_and_gradients()
        optimizer.update(model, gradients)
        mx.eval(model.trainable_parameters(), optimizer.state, loss)
        return loss

    return step, optimizer


def _state(optimizer: object) -> dict[str, mx.array]:
    flat = tree_flatten(getattr(optimizer, "state", {}))
    return {name: mx.array(array) for name, array in flat if isinstance(array, mx.array)}


def _adapter(model: nn.Module) -> dict[str, mx.array]:
    flat = tree_flatten(model.parameters())
    return {name: mx.array(a) for name, a in flat if name.rpartition(".")[2] in ENDS}


def _pending(model: nn.Module, optimizer: object, loss: object) -> Pending:
    trees = (model.parameters(), getattr(optimizer, "state", {}), getattr(loss, "loss", loss))
    groups = [[a for _, a in tree_flatten(tree) if isinstance(a, mx.array)] for tree in trees]
    return Pending(*map(_operations, groups), total=_operations([a for g in groups for a in g]))


def _operations(arrays: list[mx.array]) -> int:
    graph = io.StringIO()
    mx.export_to_dot(graph, *arrays)
    return graph.getvalue().count("shape=rectangle")  # an evaluated array is a mere name


def check_frozen(updates: Updates) -> Finding:
    """Heading "frozen": parameters that do not train keep their bytes."""
    frozen = updates.before.keys() - updates.trainable
    if not frozen:
        return not_applicable("frozen", "nothing is frozen")
    moved = sorted(updates.moved - updates.trainable)
    if moved:
        return failed(
            "frozen",
            f"{len(moved)} of {len(frozen)} frozen parameters changed: {shown(moved)}",
            "the update goes over all parameters: mx.value_and_grad, or weight decay, by "
            "model.parameters() instead of model.trainable_parameters()",
        )
    return passed("frozen", f"all {len(frozen)} frozen parameters are bit for bit as before")


def check_adapter(training: Training, updates: Updates, slopes: dict[str, mx.array]) -> Finding:
    """Heading "lora_a": at rest until lora_b has left zero, then it moves.

    Args:
        training: what is under test, as it was before the updates.
        updates: what they did.
        slopes: gradients before the updates, by name.
    """
    names = {end: [n for n in slopes if n.rpartition(".")[2] == end] for end in ENDS}
    before, heading = updates.adapter[0], "lora_a"
    if not names["lora_a"] or not names["lora_b"]:
        return not_applicable(heading, "no adapter with lora_a and lora_b trains")
    if set(names["lora_b"]) - set(zeros({n: before[n] for n in names["lora_b"]})):
        return not_applicable(heading, "lora_b is not zero: this adapter has been trained")
    early = [n for n in names["lora_a"] if n not in zeros({n: slopes[n]})]
    if early:
        says = f"{shown(early)} has a gradient while lora_b is zero"
        return failed(heading, says, "the update is not scale · (x @ lora_a) @ lora_b")
    moves = [_moved(before, after) for after in updates.adapter[1:]]
    first = next((number for number, moved in enumerate(moves, 1) if moved), None)
    if first is None or first == UPDATES:
        return not_applicable(heading, f"the adapter did not move in {UPDATES - 1} updates")
    late_b = sorted(set(names["lora_b"]) - moves[first - 1])
    if late_b:
        says = f"{len(late_b)} lora_b did not move at update {first}: {shown(late_b)}"
        return failed(heading, says, "no gradient reaches them, or the optimizer leaves them out")
    late_a = sorted(set(names["lora_a"]) - moves[first])
    if late_a:
        says = f"{len(late_a)} lora_a did not move by update {first + 1}: {shown(late_a)}"
        return failed(heading, says, "no gradient reaches them, or the optimizer leaves them out")
    return passed(
        heading,
        f"gradient exactly zero while lora_b is; lora_b moved at update {first}, all "
        f"{len(names['lora_a'])} lora_a by update {first + 1}",
    )


def _moved(before: dict[str, mx.array], after: dict[str, mx.array]) -> set[str]:
    return {name for name in before if not mx.array_equal(before[name], after[name]).item()}


def check_movement(updates: Updates) -> Finding:
    """Heading "movement": every trainable parameter changed."""
    still = sorted(updates.trainable - updates.moved)
    if len(still) == len(updates.trainable):
        return failed(
            "movement",
            f"none of {len(still)} trainable parameters changed in {UPDATES} updates",
            "optimizer.update(model, gradients) is missing or works on a copy, or the learning "
            "rate is 0",
        )
    if still:
        return failed(
            "movement",
            f"{len(still)} of {len(updates.trainable)} trainable parameters did not change in "
            f"{UPDATES} updates: {shown(still)}",
            "no gradient reaches them: they are not on the way from the tokens to the loss",
        )
    count = len(updates.trainable)
    return passed("movement", f"all {count} trainable parameters changed in {UPDATES} updates")


def check_optimizer(updates: Updates) -> Finding:
    """Heading "optimizer": its step count and its moments move."""
    before, after, heading = updates.state_before, updates.state_after, "optimizer"
    if updates.optimizer is None:
        return not_applicable(heading, "step was given without its optimizer")
    if not after:
        return not_applicable(heading, "the optimizer keeps no state")
    counts = [name for name in after if name.rpartition(".")[2] == "step"]
    made = [int(after[n].item()) - int(before[n].item() if n in before else 0) for n in counts]
    if made and not max(made):
        return failed(
            heading,
            f"its step count is still {after[counts[0]].item()} after {UPDATES} updates",
            "step uses another optimizer, such as one made anew every time, or none",
        )
    moments = _moments(updates.optimizer, after)
    dead = zeros(moments)
    still = [n for n in moments if n in before and mx.array_equal(before[n], after[n]).item()]
    if dead or still:
        wrong = dead or still
        says = f"{len(wrong)} of {len(moments)} moments {'are zero' if dead else 'did not move'}"
        cause = "their parameters get no gradient, or the state is set back at every step"
        return failed(heading, f"{says} after {UPDATES} updates: {shown(wrong)}", cause)
    if not updates.uses_moments:
        says = f"an update with {len(moments)} moments set to zero is the same, bit for bit"
        return failed(heading, says, "the state is set back before every step")
    count = f"{max(made)} steps counted, " if made else ""
    return passed(heading, f"{count}{len(moments)} moments, all non-zero and moving")


def _moments(optimizer: object, state: dict[str, mx.array]) -> dict[str, mx.array]:
    if not getattr(optimizer, "momentum", 1):
        return {}  # SGD without momentum keeps zeros
    return {name: array for name, array in state.items() if _is_moment(array)}


def _is_moment(value: object) -> bool:
    # The step count and the learning rate are scalars.
    return isinstance(value, mx.array) and value.ndim > 0


def check_evaluation(updates: Updates) -> Iterator[Finding]:
    """Heading "evaluation": after each step, nothing waits to be evaluated."""
    *_, previous, last = updates.pending
    totals = [pending.total for pending in updates.pending]
    counts = ", ".join(map(str, totals))
    is_growing = all(a < b for a, b in itertools.pairwise(totals))
    state = "parameters" if last.parameters > previous.parameters else "optimizer state"
    if is_growing:
        growth = totals[-1] - totals[-2]
        yield failed(
            "evaluation",
            f"{counts} operations wait after updates 1 to {UPDATES}, mostly in the {state}",
            f"the update is never evaluated: the graph grows by {growth} operations a step until "
            "it hangs; mx.eval(model.trainable_parameters(), optimizer.state, loss) once a step",
        )
    elif last.parameters or last.state:
        yield failed(
            "evaluation",
            f"{counts} operations wait after updates 1 to {UPDATES}: the next step evaluates this "
            "one's update, and its activations stay in memory",
            "mx.eval(model.trainable_parameters(), optimizer.state, loss) once a step",
        )
    if last.loss and not is_growing and not last.parameters:
        yield failed(
            "evaluation",
            f"the returned loss still waits for {last.loss} operations: every loss that is kept "
            "keeps its graph",
            "evaluate the loss together with the update, and keep loss.item()",
        )
    if not totals[-1]:
        yield passed("evaluation", f"nothing waits after each of {UPDATES} updates")
