"""Write the draft of a bundle, and the command line of a script that does.

A draft is the folder that becomes a bundle when it is packed.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import save_file
from torch import nn

from compressors.contracts import Architecture, Network, Signature
from examples.public_data import DATA_VARIABLE, DataMissing

CALIBRATION_ROWS = 4096
"""Training rows that are drawn for the calibration split."""


def write_draft(
    folder: Path,
    *,
    name: str,
    architecture: Architecture,
    network: nn.Module,
    signature: Signature,
    splits: Mapping[str, pa.Table],
    ties: Mapping[str, str] | None = None,
) -> None:
    """Write data, weights and ``model.json``, which is written last.

    Args:
        folder: folder of the draft; created if needed, files of an earlier draft are replaced.
        name: name of the bundle.
        architecture: class and arguments of the network.
        network: the trained network.
        signature: its signature.
        splits: rows by the name of the split.
        ties: names of tensors that are not written, and the name of the tensor that they equal.
    """
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / "model.json"
    manifest.unlink(missing_ok=True)
    ties = dict(ties or {})
    for split, table in splits.items():
        pq.write_table(table, folder / f"{split}.parquet")
    state = {key: value.contiguous() for key, value in network.state_dict().items()}
    save_file(
        {key: value for key, value in state.items() if key not in ties},
        folder / "model.safetensors",
    )
    document = {
        "schema_version": 2,
        "name": name,
        "version": "1",
        "signature": signature.model_dump(mode="json"),
        "network": Network(architecture=architecture, ties=ties).model_dump(mode="json"),
        "data": {split: f"{split}.parquet" for split in splits},
    }
    manifest.write_text(json.dumps(document, indent=1) + "\n")


def create_parser(script: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the arguments of all scripts that read public data.

    Args:
        script: name of the module, such as ``examples.frappe``.
        description: what the script does.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {script}", description=description)
    parser.add_argument("folder", type=Path, help="folder of the draft of the bundle")
    parser.add_argument(
        "--data",
        type=Path,
        help=f"folder of the public files; by default a subfolder of {DATA_VARIABLE}",
    )
    parser.add_argument("--epochs", type=int, default=None, help="largest number of epochs")
    parser.add_argument("--seed", type=int, default=1)
    return parser


def run_script(folder: Path, write: Callable[[Callable[[str], None]], None]) -> int:
    """Call ``write`` with a function that prints progress to standard error.

    Returns:
        The exit code: 0, or 2 if the data is missing.
    """

    def log(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    try:
        write(log)
    except DataMissing as error:
        log(str(error))
        return 2
    log(f"wrote {folder}")
    return 0
