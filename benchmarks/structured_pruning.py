"""How much AUC do ``channels`` and Torch-Pruning lose with half of the dense multiply-adds?

``channels`` is the step of recpress that removes output channels of dense layers. The model is the
Frappe DCN-v2 of ``benchmarks/ctr.py``, with 5 seeds. A candidate is a pruning method with its
settings. Every candidate keeps at most half of the multiply-adds of all dense layers, with widths
that are multiples of 8. The pruned networks are then trained for the same number of epochs on the
same rows, with the same learning rate and frozen tables. The epoch with the best validation AUC is
kept.

Torch-Pruning has settings that work for this model: it ignores the head, the cross layers (their
width is fixed by their input) and the tables. Its candidates are two importances (group L2,
Taylor), each global and per layer. ``channels`` also has four candidates, each of which refits the
consuming layers by least squares. For each of the two libraries, the validation AUC after training
selects one candidate on the first seed; the other seeds use the same candidates.

The second printed table has the loss of AUC on test rows, as mean over seeds ± half the width of
its 95 % interval. ``channels`` is in this table twice: trained on the labels only, and on labels
and soft labels of the original model. Random channels are the baseline, removed with and without
the least-squares refit.

    uv pip install 'recpress[bench]'
    python -m benchmarks.structured_pruning --seeds 5
"""

import logging
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn

from benchmarks.ctr import (
    auc,
    compute_interval_half_width,
    create_parser,
    data_folder,
    default_cache,
    load_baseline,
    load_split,
    prepare_splits,
)
from compressors.contracts import Bench
from compressors.core.model import Model
from compressors.core.runner import run
from compressors.distill.soft_labels import build_mixed_loss
from compressors.distill.training.settings import Training
from compressors.distill.training.training_steps import train_model
from compressors.prune.dense.channels import Channels
from compressors.prune.dense.importance import Importance
from compressors.prune.dense.kept_shares import multiply_adds
from compressors.task_kinds.loss import hard_loss, shuffled_batches
from examples.dcnv2 import DCNv2
from examples.public_data import DataMissing

SHARE = 0.5  # of the original's multiply-adds
MULTIPLE = 8  # of all widths
BATCH = 1024  # training rows per batch
ROWS = 16_384
"""Training rows for loss gradients, activation statistics and least-squares refits."""


@dataclass(frozen=True)
class Candidate:
    """A pruning method, and the weight of soft labels in the training after it."""

    name: str
    prune: Callable[[Model, Bench], Model]
    soft_share: float = 0.0


def build_channels_candidate(
    importance: Importance, scope: str, *, reconstruct: bool = True
) -> Candidate:
    """Return a candidate that prunes with ``channels`` to a share ``SHARE`` of multiply-adds.

    Args:
        importance: the score of a channel, such as "l2".
        scope: "layer" keeps the same share of the channels of every layer, "global" compares the
            scores of the channels of all layers.
        reconstruct: whether the consuming layers are refitted by least squares.
    """
    step = Channels.model_validate(
        {
            "importance": importance,
            "scope": scope,
            "flops": SHARE,
            "multiple": MULTIPLE,
            "rows": ROWS,
            "reconstruct": reconstruct,
        }
    )

    def prune(model: Model, bench: Bench) -> Model:
        with tempfile.TemporaryDirectory() as folder:
            pruned = run(step, model, bench, Path(folder))
            return replace(pruned, module=_copy_module(pruned))

    name = f"{importance}, {scope}" + (", refitted" if reconstruct else "")
    return Candidate(name, prune)


def build_torch_pruning_candidate(
    name: str, importance: Callable[[], Any], scope: str
) -> Candidate:
    """Return a candidate that prunes with Torch-Pruning to a share ``SHARE`` of multiply-adds.

    Nine steps of bisection find the smallest pruning ratio, to 1/512, with which the network has at
    most that share.

    Args:
        name: label of the importance.
        importance: builds Torch-Pruning's importance.
        scope: "layer" or "global", as in ``build_channels_candidate``.
    """

    def prune_at(model: Model, bench: Bench, gradients: dict[str, Tensor], ratio: float) -> DCNv2:
        module = _copy_module(model)
        assert bench.train is not None
        inputs, _ = load_split(bench.train)
        pruner = torch_pruning.pruner.BasePruner(
            module,
            {field: ids[:4] for field, ids in inputs.items()},  # rows that trace the network
            importance=importance(),
            global_pruning=scope == "global",
            pruning_ratio=ratio,
            round_to=MULTIPLE,
            ignored_layers=[module.head, *module.cross, *module.tables.values()],
        )
        for parameter, gradient in gradients.items():  # which the Taylor importance reads
            module.get_parameter(parameter).grad = gradient.clone()
        pruner.step()
        module.zero_grad(set_to_none=True)
        # The head's first inputs are the cross layers' outputs, which must not be pruned.
        cross_weight = model.module.head.weight[:, : module.cross[0].in_features]
        assert torch.equal(module.head.weight[:, : cross_weight.shape[1]], cross_weight)
        return module

    def compute_loss_gradients(model: Model, bench: Bench) -> dict[str, Tensor]:
        module = _copy_module(model)
        assert bench.train is not None
        for batch in shuffled_batches(bench.train, bench.signature, BATCH, bench.seed, limit=ROWS):
            hard_loss(bench.signature, module(**batch.inputs), batch).backward()
        return {n: p.grad for n, p in module.named_parameters() if p.grad is not None}

    def prune(model: Model, bench: Bench) -> Model:
        original = total_multiply_adds(model.module, bench)
        gradients = compute_loss_gradients(model, bench) if name == "taylor" else {}
        # Pruning ratios: the largest known to be too small, the smallest known to be enough.
        low, high = 0.0, 1.0
        pruned = model.module
        for _ in range(9):
            ratio = (low + high) / 2
            candidate = prune_at(model, bench, gradients, ratio)
            if total_multiply_adds(candidate, bench) <= SHARE * original:
                high, pruned = ratio, candidate
            else:
                low = ratio
        hidden = [part.out_features for part in pruned.perceptron if isinstance(part, nn.Linear)]
        arch = model.network.architecture
        config = {**arch.config, "hidden": hidden}
        rebuilt = DCNv2(**config)
        rebuilt.load_state_dict(pruned.state_dict())
        network = model.network.model_copy(
            update={"architecture": arch.model_copy(update={"config": config})}
        )
        return replace(model, module=rebuilt.eval(), network=network)

    return Candidate(f"Torch-Pruning {name}, {scope}", prune)


CHANNELS = [
    build_channels_candidate(i, s) for i in ("l2", "activation") for s in ("layer", "global")
]
TORCH_PRUNING = [
    build_torch_pruning_candidate(name, importance, scope)
    for name, importance in (
        ("group L2", lambda: torch_pruning.importance.GroupMagnitudeImportance(p=2)),
        ("taylor", lambda: torch_pruning.importance.GroupTaylorImportance()),
    )
    for scope in ("layer", "global")
]
RANDOM = build_channels_candidate("random", "layer", reconstruct=False)
RANDOM_RECONSTRUCTED = build_channels_candidate("random", "layer")


def _copy_module(model: Model) -> DCNv2:
    """Return a copy of the network that shares no tensors with it."""
    module = DCNv2(**model.network.architecture.config)
    module.load_state_dict(model.module.state_dict())
    return module.eval()


def total_multiply_adds(module: nn.Module, bench: Bench) -> float:
    """Return the multiply-adds of all dense layers for one row."""
    return sum(multiply_adds(module, bench.signature).values())


def train_candidate(model: Model, bench: Bench, training: Training, soft_share: float) -> Model:
    """Train a copy of a pruned network, with the same settings for all candidates."""
    loss = build_mixed_loss(bench, soft_share, temperature=1.0, kind="benchmark")
    return train_model(
        replace(model, module=_copy_module(model)), bench, loss, training, keep_zeros_in=()
    )


def select(
    model: Model, bench: Bench, training: Training, cached: dict[str, tuple[Model, Model]]
) -> dict[str, Candidate]:
    """Select the best candidate of each library by validation AUC.

    Stores the pruned and the trained model of every candidate in ``cached``, by name.

    Returns:
        The candidate of ``channels`` as "ours" and the one of Torch-Pruning as "theirs".
    """
    assert bench.validation is not None
    original = total_multiply_adds(model.module, bench)
    best: dict[str, Candidate] = {}
    print("| first seed, validation AUC | pruned | trained | multiply-adds | hidden |")
    print("|---|---|---|---|---|", flush=True)
    for library, candidates in {"ours": CHANNELS, "theirs": TORCH_PRUNING}.items():
        aucs = {}
        for candidate in candidates:
            pruned = candidate.prune(model, bench)
            trained = train_candidate(pruned, bench, training, candidate.soft_share)
            cached[candidate.name] = pruned, trained
            aucs[candidate.name] = auc(trained.module, bench.validation)
            share = total_multiply_adds(pruned.module, bench) / original
            print(
                f"| {candidate.name} | {auc(pruned.module, bench.validation):.5f} | "
                f"{aucs[candidate.name]:.5f} | {share:.3f} | "
                f"{pruned.network.architecture.config['hidden']} |",
                flush=True,
            )
        best[library] = max(candidates, key=lambda item: aucs[item.name])
    return best


def main() -> None:
    """Print the selection on the first seed, then a Markdown table with one line per method."""
    parser = create_parser(__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument(
        "--ours",
        help="use the candidate of channels with this name; with --theirs, skip the selection",
    )
    parser.add_argument("--theirs", help="use the candidate of Torch-Pruning with this name")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.getLogger("compressors.distill.training.trainer").setLevel(logging.WARNING)
    try:
        folder, cache = data_folder(args.data), args.cache or default_cache()
    except DataMissing as error:
        sys.exit(str(error))
    test = prepare_splits("frappe", folder, cache)[0]["test"]
    training = Training(
        epochs=args.epochs,
        batch=BATCH,
        learning_rate=args.rate,
        schedule="cosine",
        patience=args.epochs,
    )
    model, bench = _load_baseline(0, folder, cache)
    original = total_multiply_adds(model.module, bench)
    cached: dict[str, tuple[Model, Model]] = {}  # first seed, by candidate: pruned, trained
    if args.ours and args.theirs:
        by_name = {candidate.name: candidate for candidate in (*CHANNELS, *TORCH_PRUNING)}
        best = {"ours": by_name[args.ours], "theirs": by_name[args.theirs]}
    else:
        best = select(model, bench, training, cached)
    methods = {
        "Torch-Pruning": best["theirs"],
        "random channels": RANDOM,
        "random channels, refitted": RANDOM_RECONSTRUCTED,
        "channels": best["ours"],
        "channels, half of the loss from soft labels": replace(best["ours"], soft_share=0.5),
    }
    losses: dict[str, list[float]] = {name: [] for name in methods}
    untrained_losses: dict[str, list[float]] = {name: [] for name in methods}
    for seed in range(args.seeds):
        model, bench = _load_baseline(seed, folder, cache)
        baseline_auc = auc(model.module, test)
        pruned_models: dict[str, Model] = {}
        for name, candidate in methods.items():
            if seed == 0 and candidate.soft_share == 0 and candidate.name in cached:
                pruned, trained = cached[candidate.name]
            else:
                pruned = pruned_models.get(candidate.name) or candidate.prune(model, bench)
                trained = train_candidate(pruned, bench, training, candidate.soft_share)
            pruned_models[candidate.name] = pruned
            assert total_multiply_adds(pruned.module, bench) <= SHARE * original
            untrained_losses[name].append(baseline_auc - auc(pruned.module, test))
            losses[name].append(baseline_auc - auc(trained.module, test))
            print(seed, name, f"{losses[name][-1]:+.5f}", file=sys.stderr, flush=True)
    print()
    print(f"| loss of AUC on test rows, {args.seeds} seeds | candidate | pruned | trained |")
    print("|---|---|---|---|")
    for name, candidate in methods.items():
        interval = f" ± {compute_interval_half_width(losses[name]):.5f}" if args.seeds > 1 else ""
        print(
            f"| {name} | {candidate.name} | {mean(untrained_losses[name]):+.5f} | "
            f"{mean(losses[name]):+.5f}{interval} |",
            flush=True,
        )


def _load_baseline(seed: int, folder: Path, cache: Path) -> tuple[Model, Bench]:
    """Load a baseline, with the training split as the bench's calibration rows as well."""
    model, bench = load_baseline("frappe", seed, folder, cache)
    return model, bench.model_copy(update={"calibration": bench.train})


if __name__ == "__main__":
    main()
