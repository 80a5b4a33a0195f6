"""The MovieLens example with two outputs: network, labels, training, and the written draft.

A draft is the folder of a bundle before it is packed.
"""

import json
from dataclasses import asdict

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score

from compressors.contracts import Network, Signature
from compressors.core.scores import network_scores
from compressors.core.smoke_test import smoke_test
from examples.mmoe import MMoE
from examples.movielens_tasks import (
    LabelledRows,
    Training,
    compute_aucs,
    compute_loss,
    labelled_rows,
    main,
    score,
    write_draft,
)

SMALL = Training(dim=4, experts=2, expert=8, tower=4, epochs=1, batch=4096)


@pytest.fixture(scope="module")
def draft(tmp_path_factory):
    folder = tmp_path_factory.mktemp("movielens-tasks") / "draft"
    write_draft(folder, SMALL, lambda line: None)
    return folder


@pytest.fixture(scope="module")
def network(draft):
    document = json.loads((draft / "model.json").read_text())
    config = Network.model_validate(document["network"]).architecture.config
    model = MMoE(**config).eval()
    model.load_state_dict(load_file(draft / "model.safetensors"))
    return model


def test_logits_equal_the_formula_of_the_paper():
    torch.manual_seed(0)
    net = MMoE(
        fields=[{"name": "user", "rows": 5}],
        bags=[{"name": "genres", "rows": 4}],
        tasks=["a", "b"],
        dim=3,
        experts=2,
        expert=4,
        tower=2,
    ).eval()
    for weight in net.parameters():
        torch.nn.init.normal_(weight)  # large enough that the gates differ
    inputs = {
        "user": torch.tensor([1, 4]),
        "genres": torch.tensor([0, 3, 2]),
        "genres_offsets": torch.tensor([0, 2]),
    }
    with torch.no_grad():
        logits = net(**inputs)
        bag = net.bags["genres"].weight
        pooled = torch.stack([bag[[0, 3]].mean(0), bag[2]])
        x = torch.cat([net.tables["user"].weight[[1, 4]], pooled], dim=1)
        experts = [(x @ e[0].weight.T + e[0].bias).relu() for e in net.experts]
        for task in ("a", "b"):
            gate, tower = net.gates[task], net.towers[task]
            share = torch.softmax(x @ gate.weight.T + gate.bias, dim=1)
            mixed = share[:, :1] * experts[0] + share[:, 1:] * experts[1]
            hidden = (mixed @ tower[0].weight.T + tower[0].bias).relu()
            # Modules 1 and 2 of a tower are the ReLU and dropout.
            expected = (hidden @ tower[3].weight.T + tower[3].bias).squeeze(1)
            torch.testing.assert_close(logits[task], expected)


def test_likes_are_five_stars_and_null_without_a_click(draft):
    table = pq.read_table(draft / "train.parquet").to_pandas()
    assert len(table) == 70_001
    clicked = table["click"] == 1
    assert table.loc[~clicked, "like"].isna().all()
    assert set(table.loc[clicked, "like"]) == {0, 1}
    assert 0.3 < table["like"].mean() < 0.5  # of 4 or 5 stars, a good third are 5


def test_loss_and_auc_use_the_rows_that_have_a_label(draft, network):
    split = labelled_rows(pq.read_table(draft / "validation.parquet"))
    logits = score(network, split.rows)
    has_label = ~split.labels[:, 1].isnan()
    expected = [
        roc_auc_score(split.labels[:, 0], logits[:, 0]),
        roc_auc_score(split.labels[has_label, 1], logits[has_label, 1]),
    ]
    np.testing.assert_allclose(compute_aucs(network, split), expected, atol=1e-12)
    part = torch.arange(50)
    loss = compute_loss(
        dict(zip(("click", "like"), logits[part].T, strict=True)), split.labels[part]
    )
    assert bool(loss.isfinite())
    assert isinstance(split, LabelledRows)


def test_network_of_the_draft_has_the_outputs_of_its_signature(draft, network):
    document = json.loads((draft / "model.json").read_text())
    signature = Signature.model_validate(document["signature"])
    assert [output.name for output in signature.outputs] == ["click", "like"]
    smoke_test(network, signature, "examples.mmoe:MMoE")
    split = labelled_rows(pq.read_table(draft / "validation.parquet"))
    inputs = split.rows.inputs(torch.arange(20))
    with torch.no_grad():
        scores = network_scores(network, inputs, signature)
    torch.testing.assert_close(scores, score(network, split.rows)[:20])


def test_command_writes_the_draft_of_its_settings(tmp_path, monkeypatch):
    received = {}

    def record(folder, settings, log):
        received.update(asdict(settings), folder=folder)

    monkeypatch.setattr("examples.movielens_tasks.write_draft", record)
    assert main([str(tmp_path / "d"), "--epochs", "3", "--seed", "7"]) == 0
    assert (received["folder"], received["epochs"], received["seed"]) == (tmp_path / "d", 3, 7)
