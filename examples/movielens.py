"""Train DCN-v2 on MovieLens 100K and write data and model as the draft of a bundle.

Run ``python -m examples.movielens FOLDER``; ``movielens_data.py`` reads and splits the data.

A draft is the folder that becomes a bundle when it is packed.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from compressors.contracts import Architecture, Network, Signature
from compressors.metrics.point_estimates import auc
from examples.dcnv2 import DCNv2
from examples.draft import run_script
from examples.movielens_data import (
    BAG,
    FIELDS,
    FILES,
    LONGEST_BAG,
    PACKAGE,
    UNKNOWN,
    VERSION,
    Rows,
    build_vocabularies,
    convert_to_rows,
    describe_tables,
    encode,
    find_data_folder,
    read_ratings,
    split_by_time,
    take_calibration_rows,
    write_data,
)
from examples.training import Epoch, deterministic, train_with_early_stopping


@dataclass(frozen=True)
class Training:
    """Training settings, selected by validation AUC; the test set was not used."""

    dim: int = 16
    cross_layers: int = 2
    hidden: tuple[int, ...] = (256, 128)
    dropout: float = 0.3
    batch_norm: bool = False
    batch: int = 1024
    learning_rate: float = 1e-3
    table_l2: float = 0.05
    # Shares of training rows in which the id of the user, or of the film, is replaced by the
    # unknown id. Most users and some films of the test set are unknown, so the table row of the
    # unknown id must be trained.
    forget_user: float = 0.2
    forget_item: float = 0.02
    epochs: int = 40
    patience: int = 3
    seed: int = 1
    # One thread is the fastest: the layers are too small to parallelize.
    threads: int = 1


# --- training --------------------------------------------------------------------------------


@torch.no_grad()
def score(network: nn.Module, rows: Rows, batch: int = 8192) -> Tensor:
    """Return the logits of all rows, float ``(rows,)``; sets the network to evaluation mode."""
    network.eval()
    parts = torch.split(torch.arange(len(rows)), batch)
    return torch.cat([network(**rows.inputs(part)) for part in parts])


def mask_ids(
    inputs: dict[str, Tensor], shares: Mapping[str, float], generator: torch.Generator
) -> dict[str, Tensor]:
    """Replace a random share of each named field's ids by the unknown id."""
    masked = dict(inputs)
    for name, share in shares.items():
        is_masked = torch.rand(len(inputs[name]), generator=generator) < share  # (batch,)
        masked[name] = inputs[name].masked_fill(is_masked, UNKNOWN)
    return masked


def train(
    config: Mapping[str, object],
    rows: Rows,
    validation: Rows,
    settings: Training,
    log: Callable[[str], None],
) -> tuple[DCNv2, list[Epoch]]:
    """Train a network; return it with the weights of its best epoch, and all epochs.

    The metric of an epoch is the validation AUC.
    """
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    network = DCNv2(**config)  # type: ignore[arg-type]  # plain JSON, checked by DCNv2 itself
    shares = {"user": settings.forget_user, "item": settings.forget_item}

    def compute_loss(part: Tensor) -> Tensor:
        logits = network(**mask_ids(rows.inputs(part), shares, generator))  # (batch,)
        return F.binary_cross_entropy_with_logits(logits, rows.clicks[part])

    def validation_auc() -> float:
        return auc(validation.clicks.numpy(), score(network, validation).numpy())

    epochs = train_with_early_stopping(
        network, len(rows), compute_loss, validation_auc, settings, generator, log
    )
    return network, epochs


# --- the draft of a bundle -------------------------------------------------------------------


def build_signature() -> Signature:
    """Return the network's signature, with the columns of label, group and time."""
    unknown_ids = {"out_of_range": "default_row", "default_row": UNKNOWN}
    ids = [
        {"kind": "id", "name": name, "table": f"tables.{name}", **unknown_ids} for name in FIELDS
    ]
    genres = {"kind": "jagged_bag", "name": BAG, "table": f"bags.{BAG}", "shape": [LONGEST_BAG]}
    click = {"name": "score", "kind": "ctr", "form": "logit", "label": "click", "metric": "auc"}
    return Signature.model_validate(
        {
            "inputs": [*ids, genres | unknown_ids],
            "outputs": [click],
            "group": "person",  # the user's raw token; in ``user`` all unknown users have one id
            "time": "timestamp",
        }
    )


def build_architecture(
    vocabularies: Mapping[str, Mapping[str, int]], settings: Training
) -> Architecture:
    """Return the network as an import path and JSON arguments; tables have a row for id 0."""
    return Architecture(
        path="examples.dcnv2:DCNv2",
        config={
            **describe_tables(vocabularies),
            "dim": settings.dim,
            "cross_layers": settings.cross_layers,
            "hidden": list(settings.hidden),
            "dropout": settings.dropout,
            "batch_norm": settings.batch_norm,
            "structure": "parallel",
        },
    )


def write_draft(folder: Path, settings: Training, log: Callable[[str], None]) -> dict[str, object]:
    """Read and split the data, train the network, and write the draft of a bundle.

    ``model.json`` is removed first and written last, so a folder with ``model.json`` is complete.

    Args:
        folder: folder of the draft; created if needed, files of an earlier draft are replaced.
        settings: training settings.
        log: called with each line of progress.

    Returns:
        The training record, which is also written next to the folder.

    Raises:
        DataMissing: the wheel with the data is missing, or its version or files differ.
    """
    started = time.monotonic()
    splits = split_by_time(read_ratings(find_data_folder()))
    vocabularies = build_vocabularies(splits["train"])
    tables = {name: encode(frame, vocabularies) for name, frame in splits.items()}
    tables["calibration"] = take_calibration_rows(tables["train"], settings.seed)
    for name, table in tables.items():
        log(f"{name}: {len(table)} rows, {table['click'].to_numpy().mean():.1%} clicks")

    files = write_data(folder, tables, vocabularies)
    arch = build_architecture(vocabularies, settings)
    training_start = time.monotonic()
    rows, validation = convert_to_rows(tables["train"]), convert_to_rows(tables["validation"])
    with deterministic(settings.threads):
        network, epochs = train(arch.config, rows, validation, settings, log)
    seconds = time.monotonic() - training_start
    weights = {name: value.contiguous() for name, value in network.state_dict().items()}
    save_file(weights, folder / "model.safetensors")

    best = max(epochs, key=lambda epoch: epoch.metric)
    log(
        f"best epoch {best.number}: validation AUC {best.metric:.4f}, "
        f"{sum(weight.numel() for weight in weights.values())} weights, "
        f"{seconds:.0f} s of training"
    )
    draft = {
        "schema_version": 2,
        "name": "ml100k-dcnv2",
        "version": "1",
        "signature": build_signature().model_dump(mode="json"),
        "network": Network(architecture=arch).model_dump(mode="json"),
        **files,
        "transforms": {},  # files that map raw values to ids; none
    }
    record: dict[str, object] = {
        "recipe": asdict(settings),  # training settings; no compression recipe
        "data": {"package": f"{PACKAGE}=={VERSION}", "sha256": FILES},
        "torch": torch.__version__,
        "validation_auc": best.metric,
        "training_seconds": round(seconds, 1),
        "seconds": round(time.monotonic() - started, 1),
        "epochs": [asdict(epoch) for epoch in epochs],
    }
    # Next to the folder, not in it: a bundle contains only files that its manifest names.
    folder.with_name(f"{folder.name}.training.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / "model.json").write_text(json.dumps(draft, indent=1) + "\n")
    return record


def main(argv: Sequence[str] | None = None) -> int:
    """Write the draft; progress goes to standard error. Returns 0, or 2 if the data is missing."""
    defaults = Training()
    parser = argparse.ArgumentParser(prog="python -m examples.movielens", description=main.__doc__)
    parser.add_argument("folder", type=Path, help="folder of the draft of the bundle")
    parser.add_argument(
        "--epochs", type=int, default=defaults.epochs, help="largest number of epochs"
    )
    parser.add_argument("--seed", type=int, default=defaults.seed)
    args = parser.parse_args(argv)

    settings = Training(epochs=args.epochs, seed=args.seed)

    def write(log: Callable[[str], None]) -> None:
        write_draft(args.folder.absolute(), settings, log)

    return run_script(args.folder, write)


if __name__ == "__main__":
    sys.exit(main())
