"""Models of torch-rechub and DeepCTR-Torch, as a user of these libraries constructs them.

It is not a test file: ``recpress new`` imports it as ``library_models:NAME``. Weights are random.
The libraries are in ``.venv/libraries`` (``LIBRARIES``), which must be on the import path.
"""

from collections.abc import Callable

import torch
from deepctr_torch import models as deepctr
from deepctr_torch.inputs import DenseFeat, SparseFeat, VarLenSparseFeat
from deepctr_torch.models.multitask.ple import PLE
from library_data import GENRES, ITEMS, LONGEST, USERS
from torch import nn
from torch_rechub.basic.features import DenseFeature, SequenceFeature, SparseFeature
from torch_rechub.models import multi_task, ranking
from torch_rechub.models.matching import DSSM, YoutubeDNN
from torch_rechub.models.matching import dssm_senet as senet

# Features for torch-rechub. Arguments: name, rows of the table, width of the table.
ids = [
    SparseFeature("user", USERS, 8),
    SparseFeature("item", ITEMS, 8),
    SparseFeature("genre", GENRES, 8),
]
numbers = [DenseFeature("price"), DenseFeature("age")]
history = [SequenceFeature("history", ITEMS, 8, pooling="concat", shared_with="item")]
pooled = [SequenceFeature("recent", ITEMS, 8, pooling="mean", shared_with="item", padding_idx=0)]
mlp = {"dims": [16, 8]}

# Features for DeepCTR-Torch: tables of width 8, and numbers of width 1.
columns = [
    SparseFeat("user", USERS, 8),
    SparseFeat("item", ITEMS, 8),
    SparseFeat("genre", GENRES, 8),
    DenseFeat("price", 1),
    DenseFeat("age", 1),
]
with_list = [
    *columns,
    VarLenSparseFeat(SparseFeat("recent", ITEMS, 8, embedding_name="item"), LONGEST, "mean"),
]
layers = {"dnn_hidden_units": (16, 8)}

# A 2 is the number of cross layers, tasks or experts.
RECHUB: dict[str, Callable[[], nn.Module]] = {
    "wide_deep": lambda: ranking.WideDeep(numbers, [*ids, *pooled], mlp),
    "deep_fm": lambda: ranking.DeepFM(numbers, ids, mlp),
    "dcn": lambda: ranking.DCN([*ids, *numbers], 2, mlp),
    "dcn_v2": lambda: ranking.DCNv2([*ids, *numbers], 2, mlp, use_low_rank_mixture=False),
    "dcn_v2_mixture": lambda: ranking.DCNv2(
        [*ids, *numbers], 2, mlp, use_low_rank_mixture=True, low_rank=4, num_experts=2
    ),
    "auto_int": lambda: ranking.AutoInt(ids, numbers, num_layers=1, mlp_params=mlp),
    "din": lambda: ranking.DIN(
        [ids[0], ids[2]], history, [ids[1]], mlp, {"dims": [8], "activation": "dice"}
    ),
    "mmoe": lambda: multi_task.MMOE(
        [*ids, *numbers], ["classification"] * 2, 2, {"dims": [16]}, [{"dims": [8]}] * 2
    ),
    "shared_bottom": lambda: multi_task.SharedBottom(
        [*ids, *numbers], ["classification"] * 2, {"dims": [16]}, [{"dims": [8]}] * 2
    ),
}
# Models with two towers, the methods ``user_tower`` and ``item_tower``.
tower_mlp = {"dims": [16, 8]}
of_item = [SparseFeature("product", ITEMS, 8), SparseFeature("kind", GENRES, 8)]
of_user = [
    SparseFeature("member", USERS, 8),
    SequenceFeature("lately", ITEMS, 8, pooling="mean", shared_with="product", padding_idx=0),
]
# YoutubeDNN is trained on rows with randomly drawn items, which data for retrieval does not have.
drawn = [SequenceFeature("drawn", ITEMS, 8, pooling="concat", shared_with="product")]
MATCHING: dict[str, Callable[[], nn.Module]] = {
    "youtube_dnn": lambda: YoutubeDNN(of_user, of_item[:1], drawn, tower_mlp, temperature=0.1),
    "dssm": lambda: DSSM(of_user, of_item, tower_mlp, tower_mlp),
    "senet_dssm": lambda: senet.DSSM(of_user[:1], of_item, tower_mlp, tower_mlp),
}
DEEPCTR: dict[str, Callable[[], nn.Module]] = {
    "deepctr_deep_fm": lambda: deepctr.DeepFM(with_list, with_list, **layers),
    "deepctr_xdeep_fm": lambda: deepctr.xDeepFM(columns, columns, cin_layer_size=(8,), **layers),
    "deepctr_dcn_mixture": lambda: deepctr.DCNMix(
        columns, columns, low_rank=4, num_experts=2, **layers
    ),
    "deepctr_ids": lambda: deepctr.DeepFM(columns[:3], columns[:3], **layers),
    "deepctr_dcn": lambda: deepctr.DCN(columns, columns, **layers),
    "deepctr_auto_int": lambda: deepctr.AutoInt(columns, columns, **layers),
    "deepctr_wide_deep": lambda: deepctr.WDL(columns, columns, **layers),
    "deepctr_nfm": lambda: deepctr.NFM(columns, columns, **layers),
    "deepctr_pnn": lambda: deepctr.PNN(columns, **layers),
    "deepctr_ple": lambda: PLE(
        columns,
        expert_dnn_hidden_units=(16,),
        gate_dnn_hidden_units=(8,),
        tower_dnn_hidden_units=(8,),
        task_names=("click", "like"),
    ),
    "deepctr_fibinet": lambda: deepctr.FiBiNET(columns, columns, **layers),
}


def _seeded(construct: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Return a function that constructs a model with seeded weights of a trained model's size.

    The libraries draw the weights of tables with a standard deviation of 0.0001.
    """

    def model() -> nn.Module:
        torch.manual_seed(0)
        module = construct()
        for table in module.modules():
            if isinstance(table, nn.Embedding):
                nn.init.normal_(table.weight, std=0.3)
        return module

    return model


_ALL = {**RECHUB, **MATCHING, **DEEPCTR}
# ``recpress new`` imports each function by its name in this module.
globals().update({name: _seeded(construct) for name, construct in _ALL.items()})
