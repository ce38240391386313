"""One rank of a training that a YAML of mlx_lm.lora describes; `launch` starts it.

`python -m workbench.commands.yaml_rank lora.yaml folder`
"""

from __future__ import annotations

import argparse
from pathlib import Path

import workbench as wb
from workbench.tuning.ranks import join_ranks


def main() -> None:
    """Train, and let rank 0 save the adapter, or the whole model, where the YAML says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("run_dir", type=Path, help="of rank 0: metrics and checkpoints")
    options = parser.parse_args()
    said, ranks = wb.read_mlx_lm_yaml(options.config), join_ranks()
    for note in said.notes if ranks.is_first else ():
        print(note, flush=True)
    base = wb.load_model(said.model)
    data = wb.load_dataset(
        said.data, base.tokenizer, max_length=said.max_length, train_on=said.train_on
    )
    if said.lora is None:
        wb.set_trainable(base.model, "full")
    else:
        wb.add_lora(base.model, said.lora)
    trainer = wb.Trainer(base, data, said.train, run_dir=options.run_dir, ranks=ranks)
    for report in trainer:
        if ranks.is_first:
            print(report, flush=True)
    if ranks.is_first:
        save = wb.fuse if said.lora is None else wb.save_adapter
        print(f"saved: {save(base, said.adapter_path)}", flush=True)


if __name__ == "__main__":
    main()
