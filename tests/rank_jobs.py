"""What each process of a ring does in the tests: `python -m tests.rank_jobs JOB FOLDER`.

A job's results are pickled into the folder, one file a rank; the tests compare them.
"""

from __future__ import annotations

import workbench as wb  # isort: split

import asyncio
import os
import pickle
import signal
import sys
import time
import warnings
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from tests.toy import toy_base, toy_dataset
from tests.toy_preferences import toy_preferences
from tests.toy_provenance import toy_documents
from tests.toy_streams import toy_stream
from tests.toy_training import computed, fail, interrupt, state_of, trained
from workbench.errors import WorkbenchError
from workbench.tuning.losses import supervised_loss
from workbench.tuning.ranks import ALONE, Ranks, join_ranks
from workbench.tuning.scaling import measure_all_reduce

STEPS = 5
ROWS = [7, 30, 12, 9, 21, 15, 5, 18, 11, 26, 8, 14, 3]  # by 6: the third step has one row only
VALID = [9, 14, 5, 22, 8]
PAIRS = [(3, 5), (9, 2), (4, 4), (12, 7), (2, 11), (6, 8), (5, 3)]


def trainer_of(ranks: Ranks, data=None, *, full=False, dropout=0.0, steps=STEPS, **given):
    """A trainer on a fresh toy model; six rows a step."""
    keep = ("run_dir", "loss_fn", "allow_changes", "objective", "observers")
    kept = {name: given.pop(name) for name in keep if name in given}
    base = toy_base()
    if full == "head":
        wb.untie_head(base)
        wb.set_trainable(base.model, "head")
    elif not full:
        wb.add_lora(base.model, wb.LoRAConfig(rank=4, dropout=dropout))
    if ranks.rank:  # rank 0's weights are what all start from
        own = tree_map(lambda weight: weight + ranks.rank, base.model.trainable_parameters())
        base.model.update(own)
    # Where a gradient is nearly nought, Adam would turn rounding into whole steps.
    usual = {"micro_batch_size": 6, "learning_rate": 1e-2, "adam_epsilon": 1e-3}
    settings = {"steps": steps, **usual, **given}
    data = data or toy_dataset(ROWS, VALID)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return wb.Trainer(base, data, wb.TrainConfig(**settings), ranks=ranks, **kept)


def weighed(model, batch):
    """A loss of the caller's, that measures something."""
    loss = supervised_loss(model, batch)
    return 0.5 * loss, {"half": 0.25 * loss}


def cases(folder: Path) -> dict[str, dict]:
    """Trainings that must be what they are in one process, by name."""
    accum = {"micro_batch_size": 3, "grad_accum_steps": 2}
    provenance = [wb.ProvenanceConfig(kind) for kind in ("additive", "weighted")]
    return {
        "ragged": {"valid_every": 2},
        "accumulated": {**accum, "max_grad_norm": 0.1},
        "single rows": {"micro_batch_size": 1, "grad_accum_steps": 6},
        "everything trains": {"full": True, "optimizer": "sgd"},
        "own loss": {"loss_fn": weighed},
        "checkpointed layers": {"grad_checkpoint": True, "shared_prompt": False},
        "prefix": {"data": toy_dataset(ROWS), "prefix_cache": True, "full": "head"},
        "preferences": {
            "data": toy_preferences(PAIRS, PAIRS[:3]),
            "objective": wb.DPOConfig(),
            "valid_every": 2,
        },
        "additive": {"data": toy_documents(valid=VALID), "objective": provenance[0]},
        "weighted": {"data": toy_documents(valid=VALID), "objective": provenance[1], **accum},
        "stream": {"data": toy_stream(folder / "rows")},
    }


def results(ranks: Ranks, folder: Path) -> dict[str, dict]:
    """Reports and weights of every case; of a larger ring, of the first ones."""
    found = {}
    for name, settings in list(cases(folder).items())[: None if ranks.size < 3 else 3]:
        trainer = trainer_of(ranks, **settings)
        reports = [computed(report) for report in trainer]
        found[name] = {"reports": reports, "weights": trained(trainer)}
    return found


def raised(do) -> str:
    """The error of a call, in words; "" if there was none."""
    try:
        do()
    except (WorkbenchError, KeyboardInterrupt, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def equal_job(ranks: Ranks, folder: Path) -> dict:
    """Trainings as in one process, and what is told between ranks."""
    bits = mx.array(np.array([0x80000000, 0x7FC00123, 1], dtype=np.uint32) + ranks.rank)
    exact = {"a": bits.view(mx.float32), "b": [mx.array(ranks.rank == 0), mx.array(7 + ranks.rank)]}
    sent = ranks.broadcast(exact)
    return {
        "results": results(ranks, folder),
        "broadcast": [np.array(sent["a"].view(mx.uint32)).tolist(), *(b.item() for b in sent["b"])],
        "long": ranks.gather("long", str(ranks.rank) * 3000 * (ranks.rank + 1)),
        "apart": raised(lambda: ranks.gather(f"point {ranks.rank}", None)),
        "measured": measure_all_reduce(ranks, [4, 100_000], repeats=1).message_bytes.tolist(),
    }


def resumed_job(ranks: Ranks, folder: Path) -> dict:
    """A run that was stopped and goes on, beside one that was not."""
    settings = {"valid_every": 2, "checkpoint_every": 2, "dropout": 0.1, "steps": 6}
    told: list[int] = []
    whole = trainer_of(ranks, run_dir=folder / f"whole-{ranks.rank}", **settings)
    whole_losses = [report.loss for report in whole]
    run = folder / "run" if ranks.is_first else None
    part = trainer_of(ranks, run_dir=run, observers=[lambda r: told.append(r.step)], **settings)
    for report in part:
        if ranks.rank == 1 and report.step == 2:
            part.stop("enough")
    again = trainer_of(ranks, run_dir=run, **settings)
    begun = again.steps_done
    losses = [report.loss for report in again]
    same = state_of(whole) == state_of(again)
    best = again.load_best()
    return {
        "stopped": (part.steps_done, part.stop_reason, begun),
        "told": told,
        "same": same,
        "losses": (whole_losses[begun:], losses),
        "all_losses": (whole_losses, [report.loss for report in again.reports]),
        "best": best,
        "weights": trained(again),
        "saved": str(again.save_checkpoint()),
        "folders": sorted(path.name for path in folder.glob("whole-*")),
    }


def faults_job(ranks: Ranks, folder: Path) -> dict:
    """What goes wrong on one rank, and what all make of it."""
    second = ranks.rank == 1

    def bad(model, batch):
        return supervised_loss(model, batch) * (float("nan") if second else 1.0)

    def interrupted(model, batch):
        return interrupt(supervised_loss(model, batch)) if second else supervised_loss(model, batch)

    skipping = trainer_of(ranks, loss_fn=bad, on_bad_step="skip", steps=2)
    leaving = trainer_of(ranks, loss_fn=interrupted)
    between = trainer_of(ranks, run_dir=folder / "between")

    def interrupted_between():
        for report in between:
            if second and report.step == 2:
                signal.raise_signal(signal.SIGINT)

    drifting = trainer_of(ranks, checkpoint_every=2, run_dir=folder / "drifted")

    def drift():
        for report in drifting:
            if second and report.step == 1:
                weights = drifting.model.trainable_parameters()
                drifting.model.update(tree_map(lambda w: w + 1e-6, weights))

    (folder / "file").touch()
    found = {
        "nan": raised(lambda: list(trainer_of(ranks, loss_fn=bad))),
        "skipped": [report.skipped for report in skipping],
        "interrupted": raised(lambda: list(leaving)),
        "left": (leaving.steps_done, leaving.stop_reason),
        "between": raised(interrupted_between),
        "left_between": (between.steps_done, between.stop_reason),
        "drift": raised(drift),
        "settings": raised(lambda: trainer_of(ranks, seed=ranks.rank, max_grad_norm=1.0 + second)),
        "data": raised(lambda: trainer_of(ranks, data=toy_dataset(ROWS[second:]))),
        "folder": raised(lambda: trainer_of(ranks, run_dir=folder / "file")),
        "rows": raised(lambda: trainer_of(ranks, micro_batch_size=5)),
        "reload": raised(lambda: trainer_of(ranks, run_dir=folder / "r", reload_every=1)),
    }
    steered = trainer_of(ranks)
    if ranks.is_first:
        steered.peak_learning_rate = 1e-4
    found["rates"] = [report.learning_rate for report in steered]
    return found


def paused_job(ranks: Ranks, folder: Path) -> dict:
    """Rank 0 is stopped while its panel pauses: the others must hear of it."""
    trainer = trainer_of(ranks)
    if ranks.is_first:
        panel = wb.LivePanel(trainer)

        async def scene() -> None:
            asyncio.get_running_loop().call_later(0, panel.pause)
            asyncio.get_running_loop().call_later(0.2, panel.stop)
            await asyncio.wait_for(panel.watch(), 60)

        asyncio.run(scene())
    else:
        list(trainer)
    return {"left": (trainer.steps_done < STEPS, trainer.stop_reason)}


def late_job(ranks: Ranks, folder: Path) -> dict:
    """Ctrl-C comes when the ranks have just told each other how a step ended."""
    trainer = trainer_of(ranks)

    def gather(point: str, value: object) -> list[object]:
        said = Ranks.gather(ranks, point, value)
        if ranks.rank == 1 and point == "the end of step 2":
            signal.raise_signal(signal.SIGINT)
        return said

    ranks.gather = gather
    try:
        said = raised(lambda: list(trainer))
    finally:
        del ranks.gather
    return {"said": said, "left": (trainer.steps_done, trainer.stop_reason)}


def all_job(ranks: Ranks, folder: Path) -> dict:
    """Everything that does not end the process, for one start."""
    jobs = (equal_job, resumed_job, faults_job, paused_job, late_job)
    return {job.__name__: job(ranks, folder) for job in jobs}


def forever_job(ranks: Ranks, folder: Path) -> dict:
    """Steps without end; says when the first are made."""
    for report in trainer_of(ranks, steps=1_000_000, run_dir=folder / "run"):
        if report.step == 3:
            (folder / f"going-{ranks.rank}").write_text(str(os.getpid()))
    return {"steps": report.step}


def broken_job(ranks: Ranks, folder: Path) -> dict:
    """One rank fails in a step, by an exception of its own."""
    calls: list[int] = []

    def loss(model, batch):
        calls.append(1)
        value = supervised_loss(model, batch)
        return fail(value) if ranks.rank == 1 and len(calls) == 3 else value

    list(trainer_of(ranks, loss_fn=loss))
    return {}


def silent_job(ranks: Ranks, folder: Path) -> dict:
    """One rank does something else for a long time."""
    if ranks.rank == 1:
        time.sleep(600)
    ranks.gather("here", None)
    return {}


JOBS = {name.removesuffix("_job"): job for name, job in globals().items() if name.endswith("_job")}


def main() -> None:
    """Join, work, and leave the results."""
    name, folder = sys.argv[1], Path(sys.argv[2])
    if name == "absent":
        if os.environ["MLX_RANK"] == "1":
            time.sleep(600)
        name = "silent"
    if name == "killed":
        if os.environ["MLX_RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        name = "silent"
    ranks = join_ranks()
    assert ranks is join_ranks()
    assert ranks is not ALONE
    found = JOBS[name](ranks, folder)
    (folder / f"{name}-{ranks.rank}.pickle").write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main()
