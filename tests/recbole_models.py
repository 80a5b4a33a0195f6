"""Models of RecBole, as a user of the library constructs them, and the files that they read.

It is not a test file: ``recpress new`` imports it as ``recbole_models:NAME``. Weights are random.
Packages that RecBole imports are in ``.venv/libraries``, which must be on the import path. RecBole
reads a data set from tab-separated "atomic files", which are in the working directory.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

# RecBole 1.2.1 uses names that numpy 2 removed.
np.float_, np.complex_, np.unicode_ = np.float64, np.complex128, np.str_  # type: ignore[attr-defined]

from recbole.config import Config  # noqa: E402
from recbole.data import create_dataset, data_preparation  # noqa: E402
from recbole.utils import get_model  # noqa: E402

get_model("SASRec")  # imports a module that enables anomaly detection, for all other tests too
torch.autograd.set_detect_anomaly(False)

NAME = "shop"
# KINDS is the number of kinds of items, and LONGEST the length of the longest history.
USERS, ITEMS, KINDS, LONGEST = 50, 80, 18, 6
COLUMNS = {
    "load_col": {
        "inter": ["user_id", "item_id", "label", "timestamp"],
        "user": ["user_id", "age"],
        "item": ["item_id", "kind"],
    }
}
# Settings of models that learn from labels, and below of models that read a history.
LABELLED = {
    "train_neg_sample_args": None,
    "eval_args": {"split": {"RS": [8, 1, 1]}, "order": "RO", "group_by": None, "mode": "labeled"},
    "metrics": ["AUC"],
    "valid_metric": "AUC",
}
SEQUENTIAL = {"loss_type": "BPR", "MAX_ITEM_LIST_LENGTH": LONGEST, "n_layers": 1}


def write_atomic_files(folder: Path) -> None:
    """Write the data set in RecBole's format."""
    rng = np.random.default_rng(0)
    rows = USERS * 12
    users, items = np.arange(1, USERS + 1), np.arange(1, ITEMS + 1)
    columns: dict[str, dict[str, Any]] = {
        "inter": {
            "user_id:token": np.tile(users, 12),
            "item_id:token": np.concatenate([items, rng.integers(1, ITEMS + 1, rows - ITEMS)]),
            "label:float": rng.integers(0, 2, rows),
            "timestamp:float": np.arange(rows),
        },
        "user": {"user_id:token": users, "age:token": rng.integers(18, 60, USERS)},
        "item": {"item_id:token": items, "kind:token": items % KINDS},
    }
    (folder / NAME).mkdir()
    for kind, values in columns.items():
        path = folder / NAME / f"{NAME}.{kind}"
        pd.DataFrame(values).to_csv(path, sep="\t", index=False)


def write_rows(folder: Path) -> None:
    """Write rows with the ids that RecBole gives to users, items and their features."""
    rng = np.random.default_rng(0)
    for split, rows in {"train": 400, "test": 600}.items():
        lengths = rng.integers(1, LONGEST + 1, rows)
        columns = {
            "user_id": rng.integers(1, USERS + 1, rows),
            "item_id": rng.integers(1, ITEMS + 1, rows),
            "age": rng.integers(1, 20, rows),
            "kind": rng.integers(1, KINDS + 1, rows),
            "item_id_list": [rng.integers(1, ITEMS + 1, length) for length in lengths],
            "item_length": lengths,
            "label": rng.integers(0, 2, rows),
        }
        pd.DataFrame(columns).to_parquet(folder / f"{split}.parquet")


def _model(name: str, **settings: Any) -> Callable[[], nn.Module]:
    """Return a function that constructs a model whose tables have weights as after training."""

    def construct() -> nn.Module:
        torch.manual_seed(0)
        common = {"data_path": ".", "use_gpu": False, "show_progress": False, **COLUMNS}
        config = Config(model=name, dataset=NAME, config_dict={**common, **settings})
        train, _, _ = data_preparation(config, create_dataset(config))
        module: nn.Module = get_model(name)(config, train.dataset)
        for table in module.modules():
            if isinstance(table, nn.Embedding):
                nn.init.normal_(table.weight, std=0.3)
        return module

    return construct


small = {"embedding_size": 8, "mlp_hidden_size": [16, 8]}
bpr = _model("BPR", embedding_size=8)
neu_mf = _model("NeuMF", mf_embedding_size=8, mlp_embedding_size=8, mlp_hidden_size=[16, 8])
deep_fm = _model("DeepFM", **small, **LABELLED)
dcn = _model("DCN", **small, **LABELLED, cross_layer_num=2)
auto_int = _model("AutoInt", **small, **LABELLED, attention_size=8, n_layers=1)
xdeep_fm = _model("xDeepFM", **small, **LABELLED, cin_layer_size=[8, 8])
sas_rec = _model("SASRec", **SEQUENTIAL, hidden_size=8, inner_size=16)
gru4rec = _model("GRU4Rec", **SEQUENTIAL, embedding_size=8, hidden_size=16)
dmf = _model("DMF")
stamp = _model("STAMP", **SEQUENTIAL, embedding_size=8)
