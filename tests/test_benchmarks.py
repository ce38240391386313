"""Peers in processes of their own: the same work, in turn, and all of them gone at the end."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pandas as pd
import psutil
import pytest
from mlx.utils import tree_flatten

import workbench as wb
from tests import process
from workbench.benchmarks import serving, training
from workbench.benchmarks.bench import Benchmark
from workbench.benchmarks.materials import Materials
from workbench.benchmarks.summary import Comparison, headlines
from workbench.benchmarks.workers import SCRIPTS, Worker, is_slow_without_blas, left_out
from workbench.benchmarks.workloads import (
    MLX_LM,
    MLX_LM_BLAS,
    OUR_SETTINGS,
    OURS,
    PEERS,
    TORCH,
    TORCH_BF16,
    WORKLOADS,
    chosen,
)
from workbench.blas import cache_folder, load_blas
from workbench.errors import BenchmarkError, ConfigError

pytestmark = pytest.mark.real
OTHER = MLX_LM_BLAS if is_slow_without_blas() else MLX_LM  # mlx-lm at its full speed
TINY = dataclasses.replace(WORKLOADS["W2"], rows=5, batch_size=4, epochs=2)
PYTHON = [sys.executable, "-c"]
PEER = f"""
import os, sys, time
sys.path.insert(0, {str(SCRIPTS)!r})
import channel
class Peer:
    def describe(self):
        {{}}
        return {{{{"device": "a"}}}}
channel.serve(Peer())
"""


@pytest.fixture(scope="module", autouse=True)
def alone():
    """No other test process measures meanwhile."""
    with process.one_benchmark():
        yield


@pytest.fixture(scope="module", autouse=True)
def kernels():
    """Processes that other tests have left running, such as a kernel: none is a peer."""
    return set(children())


@pytest.fixture(scope="module")
def lines():
    """What was said to be running."""
    return []


@pytest.fixture(scope="module")
def bench(lines):
    """Two layers of SmolLM2."""
    with Benchmark(layers=2, peers=[OURS, OTHER], show=lines.append) as opened:
        yield opened


@pytest.fixture(scope="module")
def chat(bench):
    """A tiny chat workload, measured; its last batch of an epoch has one row."""
    return bench.run(TINY)


def children():
    """Processes below this one that run now."""
    return [
        child
        for child in psutil.Process().children(recursive=True)
        if child.is_running() and child.status() != psutil.STATUS_ZOMBIE
    ]


def test_peers_take_turns_and_none_is_left(kernels, chat, bench, lines):
    assert list(chat.raw["peer"]) == [peer for _ in range(4) for peer in bench.peers]
    assert list(chat.raw["step"]) == [step for step in (1, 2, 3, 4) for _ in bench.peers]
    assert (chat.raw["seconds"] > 0).all()
    assert any(line.startswith(f"W2: step 4 of 4, {OTHER}") for line in lines)
    assert set(children()) <= kernels


def test_all_peers_do_the_same_work(chat):
    assert chat.start_gap < 1e-4
    table = chat.summary
    assert (table["loss after"] < table["loss before"] - 0.1).all(), "a peer did not learn"


@pytest.mark.long
def test_text_goes_the_same_way_step_by_step(bench):
    text = bench.run("W1", epochs=3, length=12)
    losses = text.raw.pivot(index="step", columns="peer", values="loss")
    for peer in losses:
        assert (losses[peer] - losses[OURS]).abs().max() < 2e-3, peer
    assert text.start_gap < 1e-4
    assert text.end_gap < 2e-3


@pytest.mark.long
@pytest.mark.parametrize("name", ["W3a", "W3b", "W4a", "W4b"])
def test_every_other_training_runs_and_starts_alike(bench, name):
    small = {"rows": 1, "batch_size": 1, "epochs": 2, "length": 8}
    result = bench.run(name, **small)
    assert set(result.raw["peer"]) == set(bench.peers) & set(WORKLOADS[name].peers)
    assert result.start_gap < 1e-4
    assert result.summary["last loss"][OURS] < result.summary["first loss"][OURS]


def test_peaks_are_those_of_the_process_and_of_mlx(chat):
    peaks = chat.summary
    held = peaks["process peak GB"]
    assert ((held > 0.1) & (held < 8)).all()
    assert peaks["MLX peak GB"][OURS] > 0.14  # two layers and an embedding in float32
    assert peaks["MLX peak GB"][[OURS, OTHER]].notna().all()


@pytest.mark.long
def test_every_peer_loads_and_generates_as_much(bench):
    served = bench.run("W5", epochs=1, length=4)
    table = served.raw.set_index(["what", "peer"])
    for what, tokens in (("generate 1", 4), ("generate 8", 32)):
        assert set(table.loc[what, "tokens"]) == {tokens}
        for _, known in served.facts.iterrows():  # mlx-lm's stream leaves out a first space
            texts = [text.strip() for text in known[f"{what} texts"]]
            assert texts == [text.strip() for text in served.facts[f"{what} texts"][OURS]]
    assert set(table.loc["load"].index) == set(bench.peers)


def test_an_answer_that_ends_early_is_refused():
    with pytest.raises(BenchmarkError, match="generated 60 tokens instead of 8 × 8"):
        serving.require_all_tokens({"peer": OURS, "tokens": 60}, 8, 8)


@pytest.mark.skipif(not is_slow_without_blas(), reason="MLX needs no other BLAS here")
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("peer", "expected"), [(MLX_LM, False), (MLX_LM_BLAS, True)])
def test_only_one_mlx_lm_has_our_blas(peer, expected):
    with Worker(peer) as worker:
        worker.ask("describe")
        maps = Path(f"/proc/{worker.pid}/maps").read_text()
        assert (Path(load_blas().path).name in maps) is expected
        assert "libmlx" in maps


def test_weights_are_the_same_everywhere(bench, smollm2):
    materials = Materials(bench._materials.folder, "smollm2-135m", layers=2)
    plain, untied = materials.model(), materials.model(untied=True)
    ours = dict(tree_flatten(wb.load_model(plain).model.parameters()))
    theirs = dict(tree_flatten(mlx_lm.load(str(plain))[0].parameters()))
    assert ours.keys() == theirs.keys()
    real = dict(tree_flatten(smollm2.model.parameters()))
    for name, array in ours.items():
        assert array.dtype == theirs[name].dtype == mx.float32
        assert mx.array_equal(array, theirs[name]).item(), name
        assert mx.array_equal(array, real[name]).item(), name
    head = wb.load_model(untied).model
    assert mx.array_equal(head.lm_head.weight, head.model.embed_tokens.weight).item()


def test_interrupt_ends_every_peer(kernels, bench):
    def interrupt(text):
        if "load the weights" in text:
            raise KeyboardInterrupt

    bench.show, before = interrupt, bench.show
    try:
        with pytest.raises(KeyboardInterrupt):
            bench.run(TINY)
    finally:
        bench.show = before
    assert set(children()) <= kernels


def test_second_benchmark_of_another_process_is_refused(bench):
    code = "from workbench.benchmarks.bench import Benchmark; Benchmark()"
    assert "another benchmark is running" in process.run(code).err


def test_a_peer_ends_with_its_conductor_in_the_middle_of_a_step():
    parent = process.start(f"""
        import sys; from workbench.benchmarks.workers import Worker
        worker = Worker({OURS!r}, [sys.executable, "-c", {PEER.format("time.sleep(60)")!r}])
        worker.send("describe"); print(worker.pid, flush=True); worker.receive()
    """)
    peer = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    process.finish(parent)
    assert psutil.wait_procs([peer], timeout=10)[1] == []


def test_dead_peer_is_named_with_its_last_words():
    code = "import sys; print('a wrong number', file=sys.stderr); sys.exit(3)"
    with (
        pytest.raises(BenchmarkError, match=r"torch.* died with code 3:\na wrong number"),
        Worker(TORCH, [*PYTHON, code]) as worker,
    ):
        worker.ask("describe")


def test_peer_that_hangs_is_named_and_ended():
    with Worker(OURS, [*PYTHON, "import time; time.sleep(60)"]) as worker:
        with pytest.raises(BenchmarkError, match=r"ours: has not answered for 0.2 s"):
            worker.ask("describe", seconds=0.2)
        assert not psutil.pid_exists(worker.pid)


def test_peer_that_talks_is_named():
    with (
        Worker(OURS, [*PYTHON, "print('hello'); input()"]) as worker,
        pytest.raises(BenchmarkError, match="answered 'hello"),
    ):
        worker.ask("describe")


def test_what_libraries_print_does_not_disturb_the_channel():
    chatter = "print('chatter'); os.system('echo more chatter')"
    with Worker(OURS, [*PYTHON, PEER.format(chatter)]) as worker:
        assert worker.ask("describe") == {"device": "a"}


def test_other_work_is_refused():
    training.require_equal({OURS: 1.0, OTHER: 1.0005, TORCH_BF16: 1.05}, OURS)
    for wrong in ({OURS: 1.0, OTHER: 1.002}, {OURS: 1.0, OTHER: float("nan")}):
        with pytest.raises(BenchmarkError, match="this is not the same work"):
            training.require_equal(wrong, OURS)


def rows(peer, seconds, **more):
    return [
        {"workload": "W1", "peer": peer, "step": step, "seconds": s, "loss": 1.0 / step, **more}
        for step, s in enumerate(seconds, 1)
    ]


def test_ratios_are_of_pairs_and_the_first_step_settles():
    raw = rows(OURS, [10, 1, 2, 4], process_peak_bytes=10**9, mlx_peak_bytes=10**9)
    raw += rows(OTHER, [1, 2, 8, 8], process_peak_bytes=2 * 10**9, mlx_peak_bytes=4 * 10**9)
    raw += rows(MLX_LM if OTHER != MLX_LM else TORCH, [30])
    facts = pd.DataFrame({peer: {"note": ""} for peer in {row["peer"] for row in raw}}).T
    result = Comparison(WORKLOADS["W1"], pd.DataFrame(raw), facts, {}, 1.0)
    other, single = result.summary.loc[OTHER], result.summary.iloc[2]
    assert (other["times slower"], other["least"], other["most"]) == (2, 2, 4)
    assert other["times slower in sum"] == pytest.approx(19 / 17)
    assert other["ours / its MLX peak"] == 0.25
    assert single["times slower"] == single["times slower in sum"] == 3
    assert headlines([result])["ratio"].tolist() == [1, 2, 3]
    epoch = dataclasses.replace(result, workload=WORKLOADS["W2"])
    assert headlines([epoch])["ratio"].tolist() == pytest.approx([1, 19 / 17, 3])
    text = json.dumps(result.record(), allow_nan=False)
    assert json.loads(text)["summary"][2]["MLX peak GB"] is None


def test_a_reason_with_markup_is_shown_as_text():
    raw = pd.DataFrame(rows(OURS, [1.0]))
    facts = pd.DataFrame({OURS: {"note": ""}}).T
    shown = Comparison(WORKLOADS["W1"], raw, facts, {TORCH: "<b>no</b>"}, 1.0)._repr_html_()
    assert "<b>" not in shown
    assert "&lt;b&gt;no" in shown


def test_a_name_stands_for_all_that_begin_with_it():
    assert [w.name for w in chosen(["W3", "W3a", "W1"])] == ["W3a", "W3b", "W1"]
    with pytest.raises(ConfigError, match=r"no workload 'W9'.*W4b"):
        chosen(["W9"])
    with pytest.raises(ConfigError, match="no peers"):
        Benchmark(peers=["tensorflow"])


def test_settings_are_those_of_the_peers_and_each_peer_has_a_reason_or_a_place():
    assert {n for n, w in WORKLOADS.items() if w.grad_checkpoint} == set(OUR_SETTINGS)
    for workload in WORKLOADS.values():
        assert OURS in workload.peers
        assert set(workload.peers) <= set(PEERS)
    assert all(left_out().values())


def test_the_cache_is_as_before(bench):
    folder = cache_folder() / "benchmark"
    assert folder.is_dir()
    bench.close()
    assert not folder.exists()
    with pytest.raises(BenchmarkError, match="closed"):
        bench.run(TINY)


def test_a_new_benchmark_takes_the_place_of_the_one_before(lines):
    with Benchmark(layers=2) as first, Benchmark(layers=2, show=lines.append):
        with pytest.raises(BenchmarkError, match="closed"):
            first.run(TINY)
        assert (cache_folder() / "benchmark").is_dir()


@pytest.mark.long
def test_torch_goes_our_way_through_padded_rows():
    pytest.importorskip("peft")
    with Benchmark(layers=2, peers=[TORCH, TORCH_BF16]) as bench:
        padded = dataclasses.replace(TINY, peers=(OURS, TORCH, TORCH_BF16))
        losses = bench.run(padded).raw.pivot(index="step", columns="peer", values="loss")
    assert (losses[TORCH] - losses[OURS]).abs().max() < 2e-3
    assert (losses[TORCH_BF16] - losses[OURS]).abs().max() < 0.2
