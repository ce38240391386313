"""The same logits in real PEFT and here, for adapters that go either way."""

import pytest

import workbench as wb
from tests.peft_reference import KINDS, Gap, both_ways, difference, needs_peft, run_jobs, widen
from tests.toy import save_toy_folder
from workbench.models.files import read_json

pytestmark = needs_peft
TOY_PROMPTS = [[5, 80, 200, 17], [9, 9, 1, 44, 258, 2, 100, 7, 7, 31, 12]]
# SmolLM2 makes a thousandfold of a rounding error: with or without an adapter, PEFT in float32 is
# up to 7e-5 from PEFT in float64, and so are we. Two such computations differ by the sum, more or
# less with the BLAS. In float64 that is out of the way: what is left is how RoPE's angles are made.
SMOLLM2_GAPS = {  # largest, root mean square
    "float32": Gap(2e-4, 5e-5),
    "float64": Gap(1e-5, 2e-6),
}
QUESTIONS = ["What is the capital of Peru?", "One, two, three,"]
CHAT = "<|im_start|>user\n{}<|im_end|>\n"
TOLERANCE = 1e-4
COMMON = {"prompts": TOY_PROMPTS, "dtype": "float32"}


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory):
    folder = save_toy_folder(tmp_path_factory.mktemp("base") / "toy")
    wb.fuse(wb.load_model(folder), folder.parent / "toy-llama")  # complete for transformers
    return folder.parent / "toy-llama"


def show(found, base, record_property):
    """The table of largest differences, for the log."""
    rows = [
        f"{kind}, {direction}: {gap.largest:.1e}, root mean square {gap.rms:.1e}"
        for (kind, direction), gap in found.items()
    ]
    record_property(f"PEFT on {base}", "\n".join(rows))


def test_a_toy_llama_agrees_both_ways(toy_folder, tmp_path, record_property):
    shape = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "o_proj", "down_proj"]}
    base = wb.load_model(toy_folder)
    found = both_ways(base, toy_folder, TOY_PROMPTS, tmp_path, KINDS, 0.2, shape)
    show(found, "toy Llama", record_property)
    assert max(gap.largest for gap in found.values()) <= TOLERANCE


OTHER_SHAPES = [
    {"target_modules": "all-linear"},
    {"target_modules": ["v_proj"], "layers_to_transform": [1]},
    {"target_modules": ["v_proj", "no_such_module"], "lora_dropout": 0.1, "use_dora": True},
    {"target_modules": ["gate_proj"], "rank_pattern": {"gate_proj": 4}, "alpha_pattern": {}},
    {"target_modules": r".*\.(up|down)_proj"},
    {"target_modules": ["q_proj"], "init_lora_weights": "gaussian", "lora_alpha": 5.5},
]


@pytest.mark.long
def test_whatever_peft_saves_of_lora_loads_here(toy_folder, tmp_path):
    jobs = []
    for number, shape in enumerate(OTHER_SHAPES):
        make = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **shape}
        place = str(tmp_path / str(number))
        common = {**COMMON, "base": str(toy_folder), "noise": 0.2}
        jobs.append({**common, "make": make, "adapter": place, "logits": f"{place}.npz"})
    run_jobs(jobs, tmp_path)
    for number, shape in enumerate(OTHER_SHAPES):
        base = wb.load_model(toy_folder)
        wb.load_adapter(base, tmp_path / str(number))
        gap = difference(base, TOY_PROMPTS, tmp_path / f"{number}.npz")
        assert gap.largest <= TOLERANCE, shape


@pytest.mark.long
def test_our_last_layers_are_the_ones_that_peft_adapts(toy_folder, tmp_path):
    jobs, asked = [], {}
    for names in (["v_proj"], ["self_attn.o_proj", "mlp.up_proj"], "all-linear"):
        base = wb.load_model(toy_folder)
        wb.add_lora(base.model, wb.LoRAConfig(rank=2, target_modules=names, num_layers=1))
        for module in base.model.layers[1].modules():
            if "lora_b" in module:
                module.lora_b = module.lora_b + 0.3
        place = str(tmp_path / f"{len(jobs)}")
        wb.save_adapter(base, place, format="peft")
        common = {**COMMON, "base": str(toy_folder)}
        jobs.append({**common, "adapter": place, "logits": f"{place}.npz"})
        asked[place] = base
    run_jobs(jobs, tmp_path)
    for place, base in asked.items():
        assert difference(base, TOY_PROMPTS, f"{place}.npz").largest <= TOLERANCE
        assert read_json(f"{place}/adapter_config.json")["layers_to_transform"] == [1]


@pytest.mark.long
@pytest.mark.parametrize("dtype", SMOLLM2_GAPS)
def test_smollm2_agrees_both_ways(smollm2, tmp_path, record_property, dtype):
    fused = wb.fuse(smollm2, tmp_path / "base")
    base = wb.load_model(fused)
    if dtype == "float64":
        widen(base)
    prompts = [base.tokenizer.encode(CHAT.format(text)) for text in QUESTIONS]
    assert all(4 <= len(ids) <= 19 for ids in prompts)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    shape = {"r": 8, "lora_alpha": 16, "target_modules": names}
    kinds = {kind: KINDS[kind] for kind in ("LoRA", "rsLoRA", "DoRA")}
    found = both_ways(base, fused.path, prompts, tmp_path, kinds, 0.005, shape)
    wb.remove_lora(base.model)
    found["no adapter", "fused → transformers"] = difference(base, prompts, tmp_path / "base.npz")
    show(found, f"SmolLM2, {dtype}", record_property)
    assert max(gap.largest for gap in found.values()) <= SMOLLM2_GAPS[dtype].largest
    assert max(gap.rms for gap in found.values()) <= SMOLLM2_GAPS[dtype].rms
