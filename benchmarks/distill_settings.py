"""How much of the quality lost to pruning does distillation recover, by its settings?

Prunes the channels of the demo's model (``recpress demo``: DCN-v2 on MovieLens 100K), then trains
it with ``distill``. Prints the validation AUC of the best epoch as mean over four seeds of the row
order. The best epoch is selected by the same validation rows, so its AUC is too high: compare the
lines only with each other.

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
from tasks.bundles.bundle_ref import find_bundle
from tasks.bundles.loading import build_bench, fetch_split, load_bundle
from tasks.prepare import prepare
from tasks.score import score

KEPT_SHARES = (0.5, 0.25)  # shares of the channels that pruning keeps
SOFT_SHARES = (0.5, 1.0)  # weight of the soft labels in the loss; labels get the rest
LEARNING_RATES = (1e-3, 3e-3)
SEEDS = 4
SCORING_ROWS = 8192  # rows per batch of the evaluation
PATIENCE = 3  # epochs without a better validation AUC after which training ends


def evaluate_auc(module: nn.Module, bench: Bench) -> float:
    """Return the AUC of a network on the validation rows."""
    assert bench.validation is not None
    all_batches = list(batches(bench.validation, bench.signature, SCORING_ROWS))
    with torch.no_grad():
        scores = [module(**batch.inputs).reshape(-1) for batch in all_batches]
    label = np.concatenate([batch.label.numpy() for batch in all_batches])
    return point_estimates.auc(label, torch.cat(scores).numpy())


def main() -> None:
    """Print a Markdown table with one line per setting."""
    logging.getLogger("compressors.distill.training.trainer").setLevel(logging.WARNING)
    bundle_ref = find_bundle(BUNDLE)
    bundle, loaded = bundle_ref.artifact, load_bundle(bundle_ref.artifact)
    # ``fn`` of a Prefect task calls its function directly, without a flow.
    prepared = {part: prepare.fn(bundle, part) for part in ("train", "validation")}
    rows = bundle_ref.rows
    soft = score.fn(bundle, prepared["train"], rows["train"])
    splits = {part: fetch_split(artifact, rows[part]) for part, artifact in prepared.items()}
    splits["soft_labels"] = fetch_split(soft, rows["train"])
    bench = build_bench(loaded.manifest, splits, bundle, seed=0)
    print(f"as trained: {evaluate_auc(loaded.model.module, bench):.5f}")
    print("| keep | soft share | learning rate | schedule | before training | after |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for keep in KEPT_SHARES:
            pruned = run(Channels(keep=keep), loaded.model, bench, Path(scratch) / f"{keep}")
            before = evaluate_auc(pruned.module, bench)
            for share, rate, schedule in product(
                SOFT_SHARES, LEARNING_RATES, ("plateau", "cosine")
            ):
                training = Training(learning_rate=rate, schedule=schedule, patience=PATIENCE)
                step = Distill(soft_share=share, training=training)
                aucs = []
                for seed in range(SEEDS):
                    seeded = bench.model_copy(update={"seed": seed})
                    folder = Path(scratch) / f"{keep}-{share}-{rate}-{schedule}-{seed}"
                    aucs.append(evaluate_auc(run(step, pruned, seeded, folder).module, bench))
                print(
                    f"| {keep} | {share} | {rate:g} | {schedule} | {before:.5f} | "
                    f"{mean(aucs):.5f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
