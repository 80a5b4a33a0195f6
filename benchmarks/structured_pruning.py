"""Half of the dense multiply-adds gone: our ``channels`` against Torch-Pruning alone.

The Frappe DCN-v2 of ``benchmarks/ctr.py``, 5 seeds. Every candidate keeps at most half of the
multiply-adds of all dense layers, widths a multiple of 8, and is then trained for the same epochs
on the same rows at the same rate, tables left as they are, its best epoch on validation rows kept.

Torch-Pruning is given what works for it here: the head, the cross layers (as wide as what they
read) and the tables are ignored, and of its importances (group L2, Taylor), globally and by layer,
the one that is best on validation rows after training. Ours is chosen in the same way among as
many, each with the layers behind the cut solved anew. That choice is made on the first seed, the
rest are told of; test rows are read once, for what is printed. Ours may also learn from the
original's answers, which costs no epoch more; it is printed with and without.

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
    DataMissing,
    arguments,
    auc,
    baseline,
    data_folder,
    default_cache,
    interval,
    prepared,
    tensors,
)
from compressors.contracts import Bench
from compressors.core.model import Model
from compressors.core.runner import run
from compressors.distill.soft_labels import mixed_loss
from compressors.distill.training.settings import Training
from compressors.distill.training.training_steps import train_model
from compressors.prune.dense.channels import Channels
from compressors.prune.dense.importance import Importance
from compressors.prune.dense.kept_shares import multiply_adds
from compressors.task_kinds.loss import hard_loss, shuffled
from examples.dcnv2 import DCNv2

SHARE = 0.5
MULTIPLE = 8
ROWS = 16_384
"""Training rows that gradients and activations are taken on, and layers are solved on."""


@dataclass(frozen=True)
class Candidate:
    """A way to cut, and how much of what is learned afterwards is the original's answers."""

    name: str
    cut: Callable[[Model, Bench], Model]
    soft_share: float = 0.0


def ours(importance: Importance, scope: str, *, solved: bool = True) -> Candidate:
    """``channels`` with a target of multiply-adds."""
    step = Channels.model_validate(
        {
            "importance": importance,
            "scope": scope,
            "flops": SHARE,
            "multiple": MULTIPLE,
            "rows": ROWS,
            "reconstruct": solved,
        }
    )

    def cut(model: Model, bench: Bench) -> Model:
        with tempfile.TemporaryDirectory() as folder:
            made = run(step, model, bench, Path(folder))
            return replace(made, module=_copied(made))

    words = f"{importance}, {scope}" + (", solved anew" if solved else "")
    return Candidate(words, cut)


def theirs(name: str, importance: Callable[[], Any], scope: str) -> Candidate:
    """Torch-Pruning: the smallest ratio that leaves at most half of the multiply-adds."""

    def at(model: Model, bench: Bench, slopes: dict[str, Tensor], ratio: float) -> DCNv2:
        module = _copied(model)
        assert bench.train is not None
        inputs, _ = tensors(bench.train)
        pruner = torch_pruning.pruner.BasePruner(
            module,
            {field: ids[:4] for field, ids in inputs.items()},
            importance=importance(),
            global_pruning=scope == "global",
            pruning_ratio=ratio,
            round_to=MULTIPLE,
            ignored_layers=[module.head, *module.cross, *module.tables.values()],
        )
        for parameter, slope in slopes.items():
            module.get_parameter(parameter).grad = slope.clone()
        pruner.step()
        module.zero_grad(set_to_none=True)
        crossed = model.module.head.weight[:, : module.cross[0].in_features]
        assert torch.equal(module.head.weight[:, : crossed.shape[1]], crossed)
        return module

    def slopes_of(model: Model, bench: Bench) -> dict[str, Tensor]:
        module = _copied(model)
        assert bench.train is not None
        for batch in shuffled(bench.train, bench.signature, 1024, bench.seed, limit=ROWS):
            hard_loss(bench.signature, module(**batch.inputs), batch).backward()
        return {n: p.grad for n, p in module.named_parameters() if p.grad is not None}

    def cut(model: Model, bench: Bench) -> Model:
        whole = work(model.module, bench)
        slopes = slopes_of(model, bench) if name == "taylor" else {}
        low, high = 0.0, 1.0  # of channels that go: too few, enough
        made = model.module
        for _ in range(9):
            ratio = (low + high) / 2
            tried = at(model, bench, slopes, ratio)
            if work(tried, bench) <= SHARE * whole:
                high, made = ratio, tried
            else:
                low = ratio
        hidden = [part.out_features for part in made.perceptron if isinstance(part, nn.Linear)]
        built = model.network.architecture
        config = {**built.config, "hidden": hidden}
        rebuilt = DCNv2(**config)
        rebuilt.load_state_dict(made.state_dict())
        network = model.network.model_copy(
            update={"architecture": built.model_copy(update={"config": config})}
        )
        return replace(model, module=rebuilt.eval(), network=network)

    return Candidate(f"Torch-Pruning {name}, {scope}", cut)


OURS = [ours(i, s) for i in ("l2", "activation") for s in ("layer", "global")]
THEIRS = [
    theirs(name, make, scope)
    for name, make in (
        ("group L2", lambda: torch_pruning.importance.GroupMagnitudeImportance(p=2)),
        ("taylor", lambda: torch_pruning.importance.GroupTaylorImportance()),
    )
    for scope in ("layer", "global")
]
CHANCE = ours("random", "layer", solved=False)
SOLVED_CHANCE = ours("random", "layer")


def _copied(model: Model) -> DCNv2:
    """The network over tensors of its own."""
    made = DCNv2(**model.network.architecture.config)
    made.load_state_dict(model.module.state_dict())
    return made.eval()


def work(module: nn.Module, bench: Bench) -> float:
    """Multiply-adds of all dense layers for one row."""
    return sum(multiply_adds(module, bench.signature).values())


def trained(model: Model, bench: Bench, how: Training, soft_share: float) -> Model:
    """The network after the same training as every other."""
    loss = mixed_loss(bench, soft_share, 1.0, "benchmark")
    return train_model(replace(model, module=_copied(model)), bench, loss, how, ())


def choose(
    model: Model, bench: Bench, how: Training, kept: dict[str, tuple[Model, Model]]
) -> dict[str, Candidate]:
    """The best of either side on validation rows; what was made of each goes into ``kept``."""
    assert bench.validation is not None
    whole = work(model.module, bench)
    best: dict[str, Candidate] = {}
    print("| first seed, validation AUC | cut | trained | multiply-adds | hidden |")
    print("|---|---|---|---|---|", flush=True)
    for whose, candidates in {"ours": OURS, "theirs": THEIRS}.items():
        found = {}
        for candidate in candidates:
            cut = candidate.cut(model, bench)
            done = trained(cut, bench, how, candidate.soft_share)
            kept[candidate.name] = cut, done
            found[candidate.name] = auc(done.module, bench.validation)
            print(
                f"| {candidate.name} | {auc(cut.module, bench.validation):.5f} | "
                f"{found[candidate.name]:.5f} | {work(cut.module, bench) / whole:.3f} | "
                f"{cut.network.architecture.config['hidden']} |",
                flush=True,
            )
        best[whose] = max(candidates, key=lambda item: found[item.name])
    return best


def main() -> None:
    """Print the choice on the first seed, then one line a method."""
    parser = arguments(__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument(
        "--ours", help="what an earlier run chose, with --theirs: nothing is chosen"
    )
    parser.add_argument("--theirs")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    logging.getLogger("compressors.distill.training.trainer").setLevel(logging.WARNING)
    try:
        folder, cache = data_folder(asked.data), asked.cache or default_cache()
    except DataMissing as fault:
        sys.exit(str(fault))
    test = prepared("frappe", folder, cache)[0]["test"]
    how = Training(
        epochs=asked.epochs,
        batch=1024,
        learning_rate=asked.rate,
        schedule="cosine",
        patience=asked.epochs,
    )
    model, bench = _baseline(0, folder, cache)
    whole = work(model.module, bench)
    kept: dict[str, tuple[Model, Model]] = {}  # of the first seed: cut, and trained
    if asked.ours and asked.theirs:
        named = {candidate.name: candidate for candidate in (*OURS, *THEIRS)}
        best = {"ours": named[asked.ours], "theirs": named[asked.theirs]}
    else:
        best = choose(model, bench, how, kept)
    lines = {
        "Torch-Pruning": best["theirs"],
        "random channels": CHANCE,
        "random channels, solved anew": SOLVED_CHANCE,
        "channels": best["ours"],
        "channels, half of the loss the original's answers": replace(best["ours"], soft_share=0.5),
    }
    losses: dict[str, list[float]] = {name: [] for name in lines}
    before: dict[str, list[float]] = {name: [] for name in lines}
    for seed in range(asked.seeds):
        model, bench = _baseline(seed, folder, cache)
        first = auc(model.module, test)
        cuts: dict[str, Model] = {}
        for name, candidate in lines.items():
            if seed == 0 and candidate.soft_share == 0 and candidate.name in kept:
                cut, done = kept[candidate.name]
            else:
                cut = cuts.get(candidate.name) or candidate.cut(model, bench)
                done = trained(cut, bench, how, candidate.soft_share)
            cuts[candidate.name] = cut
            assert work(cut.module, bench) <= SHARE * whole
            before[name].append(first - auc(cut.module, test))
            losses[name].append(first - auc(done.module, test))
            print(seed, name, f"{losses[name][-1]:+.5f}", file=sys.stderr, flush=True)
    print()
    print(f"| AUC lost on test rows, {asked.seeds} seeds | as | cut only | trained |")
    print("|---|---|---|---|")
    for name, candidate in lines.items():
        spread = f" ± {interval(losses[name]):.5f}" if asked.seeds > 1 else ""
        print(
            f"| {name} | {candidate.name} | {mean(before[name]):+.5f} | "
            f"{mean(losses[name]):+.5f}{spread} |",
            flush=True,
        )


def _baseline(seed: int, folder: Path, cache: Path) -> tuple[Model, Bench]:
    """A trained network; activations are looked at on training rows."""
    model, bench = baseline("frappe", seed, folder, cache)
    return model, bench.model_copy(update={"calibration": bench.train})


if __name__ == "__main__":
    main()
