"""Find the folder of a public data set that a training script reads."""

import os
from pathlib import Path

DATA_VARIABLE = "RECPRESS_DATA"
"""Environment variable with the folder of the public data sets, one subfolder each."""


class DataMissing(Exception):
    """The data is missing, or differs from the data of the published results."""


def find_data_folder(option: Path | None, name: str, remedy: str) -> Path:
    """Return the folder of the option ``--data``, else the folder ``name`` in ``RECPRESS_DATA``.

    Args:
        option: the value of ``--data``.
        name: name of the data set and of its folder.
        remedy: how to get the data, as a sentence; it follows the message.

    Raises:
        DataMissing: the folder does not exist, or neither is set.
    """
    root = os.environ.get(DATA_VARIABLE)
    folder = option or (Path(root) / name if root else None)
    if folder is None or not folder.is_dir():
        raise DataMissing(
            f"Expected a folder with the data set {name!r}, got "
            f"{folder or f'neither --data nor {DATA_VARIABLE}'}. {remedy} Pass the folder with "
            f"--data."
        )
    return folder
