"""How much does distillation win back of what pruning cost, by its settings?

On the demo's model and its validation rows: the best epoch's AUC, the mean over four seeds of the
order of rows. Chosen and told on the same rows, so the lines are for comparison with each other.

    recpress demo && python -m benchmarks.distill_settings
"""

import logging
import tempfile
from itertools import product
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from torch import nn

from compressors.contracts import Bench
from compressors.core.batches import batches
from compressors.core.runner import run
from compressors.distill.distill import Distill
from compressors.distill.training.settings import Training
from compressors.metrics import point_estimates
from compressors.prune.dense.channels import Channels
from flows.cli.demo import BUNDLE
from tasks.bundles.bundle_ref import find
from tasks.bundles.loading import bench_of, load_bundle, split_of
from tasks.prepare import prepare
from tasks.score import score

KEEP, SHARES, RATES = (0.5, 0.25), (0.5, 1.0), (1e-3, 3e-3)
SEEDS = 4
PATIENCE = 3


def auc_of(module: nn.Module, bench: Bench) -> float:
    """AUC on the validation rows."""
    assert bench.validation is not None
    rows = list(batches(bench.validation, bench.signature, 8192))
    with torch.no_grad():
        scores = [module(**part.inputs).reshape(-1) for part in rows]
    label = np.concatenate([part.label.numpy() for part in rows])
    return point_estimates.auc(label, torch.cat(scores).numpy())


def main() -> None:
    """Print one line a setting, as a Markdown table."""
    logging.getLogger("compressors.distill.training.trainer").setLevel(logging.WARNING)
    subject = find(BUNDLE)
    bundle, loaded = subject.artifact, load_bundle(subject.artifact)
    parts = {part: prepare.fn(bundle, part, "benchmark") for part in ("train", "validation")}
    rows = subject.rows
    soft = score.fn(bundle, parts["train"], rows["train"], "benchmark")
    held = {part: split_of(made, rows[part]) for part, made in parts.items()}
    held["soft_labels"] = split_of(soft, rows["train"])
    bench = bench_of(loaded.manifest, held, bundle, 0)
    print(f"as trained: {auc_of(loaded.model.module, bench):.5f}")
    print("| keep | soft share | rate | schedule | before training | after |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for keep in KEEP:
            cut = run(Channels(keep=keep), loaded.model, bench, Path(scratch) / f"{keep}")
            before = auc_of(cut.module, bench)
            for share, rate, schedule in product(SHARES, RATES, ("plateau", "cosine")):
                how = Training(learning_rate=rate, schedule=schedule, patience=PATIENCE)
                step = Distill(soft_share=share, training=how)
                found = []
                for seed in range(SEEDS):
                    seeded = bench.model_copy(update={"seed": seed})
                    folder = Path(scratch) / f"{keep}-{share}-{rate}-{schedule}-{seed}"
                    found.append(auc_of(run(step, cut, seeded, folder).module, bench))
                print(
                    f"| {keep} | {share} | {rate:g} | {schedule} | {before:.5f} | "
                    f"{mean(found):.5f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
