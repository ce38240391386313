"""Training over ranks: real rings on loopback, compared with one process."""

from __future__ import annotations

import pickle
import sys

import numpy as np
import pytest

from tests.rank_jobs import ROWS, STEPS, results, trainer_of
from tests.toy import toy_dataset
from tests.toy_preferences import toy_preferences
from tests.toy_streams import write_files
from tests.toy_training import trained
from workbench.data.batches import collate
from workbench.data.shares import share_of, take_rows
from workbench.errors import ConfigError, RankError, RunError
from workbench.runs.launching import Limits, run_ranks
from workbench.tuning.ranks import ALONE, Ranks, join_ranks
from workbench.tuning.scaling import measure_all_reduce, predict_scaling
from workbench.tuning.update import step_seed

CLOSE = 1e-5  # of loss, gradient norm and weights, relative to one process
LIMITS = Limits(start_timeout=180, silence=120)


def ring(job: str, folder, size: int = 2) -> list[dict]:
    """What each rank of a ring found."""

    def command(rank: int) -> list[str]:
        return [sys.executable, "-m", "tests.rank_jobs", job, str(folder)]

    run_ranks(command, size, folder / "logs", LIMITS)
    return [pickle.loads((folder / f"{job}-{rank}.pickle").read_bytes()) for rank in range(size)]


@pytest.fixture(scope="module")
def rows_folder(tmp_path_factory):
    """A folder with a stream's files."""
    folder = tmp_path_factory.mktemp("ranks")
    write_files(folder / "rows", counts=(20,))
    return folder


@pytest.fixture(scope="module")
def alone(rows_folder):
    """Every case in one process."""
    return results(ALONE, rows_folder)


@pytest.fixture(scope="module")
def two(rows_folder):
    """What each of two ranks found in all jobs."""
    return ring("all", rows_folder)


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.long)])
def test_ranks_train_as_one_process_does(size, rows_folder, alone, request):
    if size == 2:
        found = [rank["equal_job"] for rank in request.getfixturevalue("two")]
    else:
        found = ring("equal", rows_folder, size)
    for name in found[0]["results"]:
        one, (first, *others) = alone[name], [rank["results"][name] for rank in found]
        assert len(one["reports"]) == STEPS
        for mine, wanted in zip(first["reports"], one["reports"], strict=True):
            assert_close(mine, wanted, name)
        for key, wanted in one["weights"].items():
            assert np.abs(first["weights"][key] - wanted).max() <= CLOSE, (name, key)
        for other in others:
            assert other["reports"] == first["reports"], name
            assert all(np.array_equal(w, first["weights"][k]) for k, w in other["weights"].items())
    for rank in found:
        assert rank["broadcast"] == [[0x80000000, 0x7FC00123, 1], True, 7]
        assert rank["long"] == [str(r) * 3000 * (r + 1) for r in range(size)]
        assert "rank 1 is at 'point 1'" in rank["apart"]
        assert rank["measured"] == [4, 100_000]


def assert_close(found: dict, wanted: dict, name: str) -> None:
    """Reports agree: counts exactly, measured numbers within rounding."""
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        if key == "accuracy" and abs(wanted["margin"]) < CLOSE:
            continue  # a fresh adapter's margins are nought but for rounding, of either sign
        if isinstance(value, dict):
            assert_close(found[key], value, f"{name}, {key}")
        elif value is None:
            assert found[key] is None, (name, key)
        else:
            assert found[key] == pytest.approx(value, rel=CLOSE, abs=CLOSE), (name, key)


def test_a_stopped_run_goes_on_bit_for_bit(two, rows_folder):
    first, second = (rank["resumed_job"] for rank in two)
    assert first["stopped"] == (3, "rank 1: enough", 3) == second["stopped"]
    assert first["told"] == [1, 2, 3]
    assert second["told"] == []
    for rank in (first, second):
        assert rank["same"]
        assert rank["losses"][0] == rank["losses"][1] == first["losses"][0]
        assert rank["all_losses"][0] == rank["all_losses"][1]
        assert rank["best"] == first["best"]
        assert all(np.array_equal(w, first["weights"][k]) for k, w in rank["weights"].items())
    assert first["folders"] == ["whole-0"]  # rank 0 alone writes
    assert first["saved"].endswith("step-000006")
    assert second["saved"] == "None"
    settings = {"valid_every": 2, "checkpoint_every": 2, "dropout": 0.1, "steps": 6}
    with pytest.raises(RunError, match="number of ranks is 1, was 2"):
        trainer_of(ALONE, run_dir=rows_folder / "run", **settings)
    allowed = trainer_of(ALONE, run_dir=rows_folder / "run", allow_changes=True, **settings)
    assert allowed.finished


def test_a_fault_of_one_rank_is_told_by_all(two, rows_folder):
    first, second = found = [rank["faults_job"] for rank in two]
    for rank in found:
        # The first step has one row only: rank 1 computes it as well, and it does not count.
        assert rank["nan"].startswith("NotFiniteError: step 2 gave loss nan")
        assert rank["skipped"] == [False, True]
        assert rank["left"][0] == 1
        assert "the weights of rank 1 are no longer those of rank 0" in rank["drift"]
        assert "max_grad_norm is 2.0, rank 0's is 1.0" in rank["settings"]
        assert "seed is 1, rank 0's is 0" in rank["settings"]
        assert "rank 1 differs from rank 0: the training data is another" in rank["data"]
        assert "5 rows a step are not divisible by 2 ranks" in rank["rows"]
        assert "such as 6 rows" in rank["rows"]
        assert "reload_every" in rank["reload"]
        assert rank["rates"][0] == 1e-4
    assert first["rates"] == second["rates"]
    assert first["interrupted"] == ""
    assert first["left"][1] == "rank 1: interrupted"
    assert second["interrupted"].startswith("KeyboardInterrupt")
    assert first["between"] == ""  # between two steps: the next is the last
    assert first["left_between"] == second["left_between"] == (3, "rank 1: interrupted")
    assert second["between"].startswith("KeyboardInterrupt")
    assert (rows_folder / "between/checkpoints/step-000003").is_dir()
    assert first["folder"].startswith("RunError")
    assert second["folder"].startswith("RankError: rank 0 failed at opening the run folder")
    assert not [
        path for path in rows_folder.glob("drifted/checkpoints/*") if path.name > "step-000000"
    ]


def test_ctrl_c_that_came_too_late_for_a_step_ends_all_after_the_next(two):
    first, second = (rank["late_job"] for rank in two)
    assert first["left"] == second["left"] == (3, "rank 1: interrupted")
    assert (first["said"], second["said"]) == ("", "KeyboardInterrupt: ")


def test_a_stop_in_a_paused_panel_ends_all_ranks(two):
    assert {rank["paused_job"]["left"] for rank in two} == {(True, "stopped by request")}


def test_every_row_is_computed_by_one_rank():
    data = toy_dataset(ROWS).train
    plans = [[[0, 1, 2, 3, 4]], [[0, 1], [2, 3, 4]], [[0], [1], [2], [3]], [[5]], [[7, 8], [9]]]
    for size in (1, 2, 3, 4):
        for plan in plans:
            batches = [collate(data, rows) for rows in plan]
            shares = [share_of(batches, rank, size) for rank in range(size)]
            rows = [row for share in shares for batch in share for row in batch.rows]
            assert sorted(rows) == sorted(row for group in plan for row in group)
            counts = [sum(len(batch.rows) for batch in share) for share in shares]
            if len(plan) % size:
                assert max(counts) - min(counts) <= 1
            tokens = [b.num_tokens for share in shares for b in share]
            assert sum(tokens) == sum(batch.num_tokens for batch in batches)


def test_whole_micro_batches_are_dealt_out_by_their_size():
    lengths = [5, 50, 6, 40]
    batches = [collate(toy_dataset(lengths).train, [row]) for row in range(4)]
    shares = [share_of(batches, rank, 2) for rank in (0, 1)]
    assert [[batch.tokens.size for batch in share] for share in shares] == [[50, 5], [40, 6]]
    assert share_of(batches, 0, 1) == batches


def test_rows_of_pairs_keep_their_two_sides():
    pairs = toy_preferences().train
    batch = collate(pairs, [0, 1, 2])
    taken, alone = take_rows(batch, [2, 0]), collate(pairs, [2, 0])
    width = alone.tokens.shape[1]
    assert np.array_equal(taken.tokens[:, :width], alone.tokens)
    assert taken.weight == 2
    assert taken.rows == (2, 0)
    assert taken.places == alone.places


def test_one_process_is_alone_and_shares_nothing(monkeypatch):
    monkeypatch.delenv("MLX_HOSTFILE", raising=False)
    assert join_ranks().alone
    assert join_ranks().is_first
    tree = {"a": [1, 2]}
    assert ALONE.add_up(tree) is tree
    assert ALONE.broadcast(tree) is tree
    assert ALONE.gather("here", 3) == [3]
    assert step_seed(3, 4) == (3 << 32) | 4
    assert len({step_seed(3, 4, rank) for rank in range(8)}) == 8


@pytest.mark.parametrize(
    ("content", "rank", "problem"),
    [
        (None, "0", "cannot be read"),
        ("[", "0", "cannot be read"),
        ('{"a": 1}', "0", "is no list of addresses"),
        ('[["127.0.0.1:1"], ["127.0.0.1:2"]]', "2", "ranks 0 to 1"),
        ('[["127.0.0.1:1"], ["127.0.0.1:2"]]', "", "ranks 0 to 1"),
    ],
)
def test_a_wrong_environment_is_named(content, rank, problem, tmp_path, monkeypatch):
    monkeypatch.setattr("workbench.tuning.ranks._joined", [])
    monkeypatch.setenv("MLX_RANK", rank)
    monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / "hosts.json"))
    if content is not None:
        (tmp_path / "hosts.json").write_text(content)
    with pytest.raises(RankError, match=problem):
        join_ranks()


def test_expected_scaling_follows_the_rings_formula():
    two = predict_scaling(1.0, 8e6, bandwidth=1e8, latency=0.01, ranks=2)
    assert two.exchange_seconds == pytest.approx(0.08 + 0.02)
    assert two.speedup == pytest.approx(1 / 0.6)
    assert two.efficiency == pytest.approx(two.speedup / 2)
    assert predict_scaling(1.0, 8e6, 1e8, 0.01, 1).speedup == 1
    with pytest.raises(ConfigError, match="bandwidth"):
        predict_scaling(1.0, 8e6, 0, 0.01, 2)
    with pytest.raises(ConfigError, match="launch -n 2"):
        measure_all_reduce(Ranks())


def test_weights_of_one_process_do_not_depend_on_ranks_being_named():
    plain, named = trainer_of(ALONE), trainer_of(Ranks())
    assert [r.loss for r in plain] == [r.loss for r in named]
    assert all(np.array_equal(w, trained(named)[k]) for k, w in trained(plain).items())
