"""DeepFM, xDeepFM, DLRM and DIN compute the formulas of their papers; the example on Frappe.

The example writes a draft: the folder that becomes a bundle when it is packed.
"""

import gzip
import json
from itertools import combinations

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from compressors.contracts import Network, Signature
from compressors.core.smoke_test import smoke_test
from examples import frappe
from examples.deepfm import DeepFM
from examples.din import DIN
from examples.dlrm import DLRM
from examples.frappe import FIELDS, FILES, main, read_splits
from examples.public_data import DATA_VARIABLE
from examples.xdeepfm import XDeepFM

TWO_FIELDS = [{"name": "user", "rows": 5}, {"name": "item", "rows": 7}]
IDS = {"user": torch.tensor([1, 4, 0]), "item": torch.tensor([6, 2, 2])}


def random_weights(network):
    """Draw all weights from a normal distribution, so that every term of a score matters."""
    torch.manual_seed(0)
    for weight in network.parameters():
        torch.nn.init.normal_(weight)
    return network.eval()


def apply_layers(layers, x):
    """Apply the linear layers of a perceptron, each with ReLU."""
    for layer in layers:
        if isinstance(layer, torch.nn.Linear):
            x = (x @ layer.weight.T + layer.bias).relu()
    return x


@torch.no_grad()
def test_deepfm_adds_linear_terms_pairs_and_a_perceptron():
    fields = [*TWO_FIELDS, {"name": "city", "rows": 3}]
    ids = {**IDS, "city": torch.tensor([0, 1, 2])}
    net = random_weights(DeepFM(fields=fields, dim=4, hidden=[6]))
    vectors = [net.tables[name].weight[values] for name, values in ids.items()]
    linear = sum(net.linear[name].weight[values, 0] for name, values in ids.items())
    pairs = sum((a * b).sum(1) for a, b in combinations(vectors, 2))
    hidden = apply_layers(net.perceptron, torch.cat(vectors, 1))
    deep = hidden @ net.head.weight[0] + net.head.bias
    torch.testing.assert_close(net(**ids), linear + pairs + deep)


@torch.no_grad()
def test_xdeepfm_sums_the_maps_of_products_of_fields_in_two_layers():
    net = random_weights(XDeepFM(fields=TWO_FIELDS, dim=4, maps=[3, 2], hidden=[6]))
    vectors = [net.tables[name].weight[values] for name, values in IDS.items()]
    linear = sum(net.linear[name].weight[values, 0] for name, values in IDS.items())
    maps, sums = vectors, []
    for layer in net.interactions:
        products = [first * second for first in maps for second in vectors]  # (rows, dim) each
        maps = [
            sum(w * x for w, x in zip(weights, products, strict=True)).add(bias).relu()
            for weights, bias in zip(layer.weight[:, :, 0], layer.bias, strict=True)
        ]
        sums += [x.sum(1) for x in maps]
    head = net.interaction_head
    crossed = torch.stack(sums, 1) @ head.weight[0] + head.bias
    hidden = apply_layers(net.perceptron, torch.cat(vectors, 1))
    deep = hidden @ net.head.weight[0] + net.head.bias
    torch.testing.assert_close(net(**IDS), linear + crossed + deep)


@torch.no_grad()
def test_dlrm_reads_the_dot_products_of_ids_bags_and_numbers():
    net = random_weights(
        DLRM(
            fields=TWO_FIELDS,
            bags=[{"name": "tags", "rows": 9}],
            dense=2,
            dim=4,
            bottom=[5],
            top=[6],
        )
    )
    numbers = torch.randn(3, 2)
    tags = {"tags": torch.tensor([3, 8, 8]), "tags_offsets": torch.tensor([0, 2, 2])}
    bag = net.bags["tags"].weight
    pooled = torch.stack([bag[3] + bag[8], torch.zeros(4), bag[8]])  # the second list is empty
    bottom = apply_layers(net.bottom, numbers)
    vectors = [net.tables[name].weight[values] for name, values in IDS.items()]
    vectors += [pooled, bottom]
    # In the order of the rows below the diagonal: (1, 0), (2, 0), (2, 1), (3, 0), ...
    dots = [(vectors[i] * vectors[j]).sum(1) for i in range(4) for j in range(i)]
    hidden = apply_layers(net.top, torch.cat([bottom, torch.stack(dots, 1)], 1))
    expected = hidden @ net.head.weight[0] + net.head.bias
    torch.testing.assert_close(net(**IDS, **tags, dense=numbers), expected)


@torch.no_grad()
def test_din_weights_each_item_of_the_history_by_its_relation_to_the_candidate():
    net = random_weights(DIN(fields=TWO_FIELDS, dim=4, attention=[6], hidden=[5]))
    history = [[3, 1], [], [5]]  # the second history is empty
    padded = torch.tensor([[3, 1], [0, 0], [5, 0]])
    mask = torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    items = net.tables["item"].weight
    interests = []
    for row, seen_ids in enumerate(history):
        candidate, interest = items[IDS["item"][row]], torch.zeros(4)
        for seen in items[seen_ids]:
            related = torch.cat([seen, candidate, seen - candidate, seen * candidate])
            hidden = apply_layers(net.attention, related)
            interest = interest + (hidden @ net.weight.weight[0] + net.weight.bias) * seen
        interests.append(interest)
    users = net.tables["user"].weight[IDS["user"]]
    x = torch.cat([users, items[IDS["item"]], torch.stack(interests)], 1)
    expected = apply_layers(net.perceptron, x) @ net.head.weight[0] + net.head.bias
    torch.testing.assert_close(net(history=padded, history_mask=mask, **IDS), expected)


# --- Frappe ----------------------------------------------------------------------------------

# The public files number the values of all fields consecutively: the first id of each field.
OFFSETS = np.cumsum([0, *FIELDS.values()])[:-1]


@pytest.fixture
def data(tmp_path):
    """Return a folder with random rows in the formats of the public files."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "frappe"
    (folder / "derived").mkdir(parents=True)
    for split, file in FILES.items():
        ids = rng.integers(0, list(FIELDS.values()), (300, len(FIELDS))) + OFFSETS
        label = rng.integers(0, 2, 300)
        if split == "train":
            lines = ["label," + ",".join(FIELDS)]
            lines += [",".join(map(str, [y, *row])) for y, row in zip(label, ids, strict=True)]
        else:  # the format of libFM: the label -1 or 1, then ``id:value`` of each feature
            lines = [
                f"{2 * y - 1} " + " ".join(f"{value}:1" for value in row)
                for y, row in zip(label, ids, strict=True)
            ]
        (folder / file).write_bytes(gzip.compress("\n".join(lines).encode()))
    return folder


def test_ids_of_every_field_start_at_zero(data):
    splits = read_splits(data)
    assert set(splits) == {"train", "validation", "test"}
    for ids, label in splits.values():
        assert ids.shape == (300, 10)
        assert set(label) == {0, 1}
        assert (ids >= 0).all()
        assert (ids < np.array(list(FIELDS.values()))).all()


@pytest.mark.parametrize("model", frappe.NETWORKS)
def test_draft_of_the_frappe_example_has_a_network_that_runs(data, tmp_path, model):
    folder = tmp_path / "draft"
    arguments = [str(folder), "--data", str(data), "--model", model, "--epochs", "1"]
    assert main(arguments) == 0
    document = json.loads((folder / "model.json").read_text())
    signature = Signature.model_validate(document["signature"])
    architecture = Network.model_validate(document["network"]).architecture
    network = frappe.NETWORKS[model](**architecture.config).eval()
    network.load_state_dict(load_file(folder / "model.safetensors"))
    smoke_test(network, signature, architecture.path)
    for split, rows in {"train": 300, "validation": 300, "test": 300, "calibration": 300}.items():
        assert len(pq.read_table(folder / f"{split}.parquet")) == rows


def test_missing_frappe_data_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    assert main([str(tmp_path / "draft")]) == 2
    error = capsys.readouterr().err
    assert "Expected a folder with the data set 'frappe'" in error
    assert "--data" in error
    assert not (tmp_path / "draft").exists()
