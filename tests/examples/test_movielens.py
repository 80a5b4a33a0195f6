"""The MovieLens example: network, split by time, vocabularies, training, and the written draft.

A draft is a folder with a model, its data and ``model.json``; ``recpress bundle pack`` stores it as
a bundle. The data are files of the installed wheel of RecBole, a library of recommenders.
"""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from compressors.contracts import Network, Signature, tensor_names
from examples import movielens, movielens_data
from examples.dcnv2 import DCNv2
from examples.movielens import Training, main, write_draft
from examples.movielens_data import FIELDS

SMALL = Training(dim=4, cross_layers=1, hidden=(8,), epochs=2, batch=4096)


@pytest.fixture(scope="module")
def frame():
    return movielens_data.read_ratings(movielens_data.find_data_folder())


@pytest.fixture(scope="module")
def splits(frame):
    return movielens_data.split_by_time(frame)


@pytest.fixture(scope="module")
def draft(tmp_path_factory):
    folder = tmp_path_factory.mktemp("movielens") / "draft"
    write_draft(folder, SMALL, lambda line: None)
    return folder


def ratings_at(seconds):
    return pd.DataFrame({"timestamp": seconds})


def small_network(**changes):
    config = {
        "fields": [{"name": "user", "rows": 10}, {"name": "item", "rows": 7}],
        "bags": [{"name": "genres", "rows": 5}],
        "dim": 4,
        "hidden": [8, 6],
    }
    torch.manual_seed(0)
    return DCNv2(**config | changes).eval()


INPUTS = {
    "user": torch.tensor([1, 2, 9]),
    "item": torch.tensor([0, 6, 1]),
    "genres": torch.tensor([1, 2, 4]),
    "genres_offsets": torch.tensor([0, 2, 2]),  # the second row's bag is empty
}

# --- the network -----------------------------------------------------------------------------


def test_logits_equal_the_formula_of_the_paper():
    net = small_network(cross_layers=2, hidden=[8])
    for weight in net.parameters():
        torch.nn.init.normal_(weight)  # large enough that the cross terms change the logits
    table, bag = net.tables["item"].weight, net.bags["genres"].weight
    user = net.tables["user"].weight[[1, 2, 9]]
    pooled = torch.stack([bag[[1, 2]].mean(0), torch.zeros(4), bag[4]])
    x0 = torch.cat([user, table[[0, 6, 1]], pooled], dim=1)
    cross_1, cross_2, hidden = *net.cross, net.perceptron[0]
    x1 = x0 * (x0 @ cross_1.weight.T + cross_1.bias) + x0
    x2 = x0 * (x1 @ cross_2.weight.T + cross_2.bias) + x1
    deep = (x0 @ hidden.weight.T + hidden.bias).relu()
    expected = torch.cat([x2, deep], dim=1) @ net.head.weight.T + net.head.bias
    # float32 sums are in another order; logits are of the order of 10
    torch.testing.assert_close(net(**INPUTS), expected.squeeze(1), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("structure", ["parallel", "stacked"])
@pytest.mark.parametrize("hidden", [[], [8, 6]])
@pytest.mark.parametrize("dense", [0, 3])
def test_every_structure_returns_one_logit_per_row(structure, hidden, dense):
    net = small_network(structure=structure, hidden=hidden, dense=dense, batch_norm=True)
    extra = {"dense": torch.randn(3, dense)} if dense else {}
    assert net(**INPUTS, **extra).shape == (3,)


def test_logit_of_a_row_does_not_depend_on_other_rows():
    net = small_network()
    single = net(
        user=torch.tensor([9]),
        item=torch.tensor([1]),
        genres=torch.tensor([4]),
        genres_offsets=torch.tensor([0]),
    )
    # only the order of the sums in the matrix product may differ for one row
    torch.testing.assert_close(net(**INPUTS)[2:], single, rtol=1e-6, atol=1e-6)


def test_unknown_structure_is_refused():
    with pytest.raises(ValueError, match="'parallel' or 'stacked', got 'serial'"):
        small_network(structure="serial")


def test_network_exports_with_dynamic_numbers_of_rows_and_ids():
    class MappingInputs(torch.nn.Module):  # torch.export has no dynamic shapes for **keywords
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, inputs):
            return self.network(**inputs)

    net = small_network(batch_norm=True)
    rows, values = torch.export.Dim("rows", max=4096), torch.export.Dim("values", max=65536)
    shapes = {name: {0: values if name == "genres" else rows} for name in INPUTS}
    program = torch.export.export(MappingInputs(net), (INPUTS,), dynamic_shapes={"inputs": shapes})
    other = {
        "user": torch.arange(5),
        "item": torch.arange(5),
        "genres": torch.tensor([0, 4]),
        "genres_offsets": torch.tensor([0, 0, 1, 1, 2]),
    }
    # the same operators in the same order
    torch.testing.assert_close(program.module()(other), net(**other), rtol=0, atol=0)


# --- the data --------------------------------------------------------------------------------


def test_read_ratings_returns_all_rows_and_counts_four_stars_as_clicks(frame):
    assert len(frame) == 100_000
    # numbers of four and five stars, from the data set's README
    assert frame["click"].sum() == 34_174 + 21_201
    assert frame["timestamp"].is_monotonic_increasing


def test_unknown_year_and_genre_are_read_as_missing(frame):
    film = frame[frame["item"] == "267"].iloc[0]
    assert (film["year"], film["genres"]) == ("", [])


def test_splits_are_in_strict_order_of_time(splits, frame):
    train, validation, test = (splits[name] for name in ("train", "validation", "test"))
    assert train["timestamp"].max() < validation["timestamp"].min()
    assert validation["timestamp"].max() < test["timestamp"].min()
    assert sum(map(len, splits.values())) == len(frame)
    # boundaries move to the end of their second, by a few rows at most
    assert [len(train), len(validation), len(test)] == pytest.approx([7e4, 1e4, 2e4], abs=50)


def test_split_boundary_within_a_second_moves_to_its_end():
    splits = movielens_data.split_by_time(ratings_at([1, 2, 3, 4, 5, 6, 7, 7, 8, 9]))
    assert [list(part["timestamp"]) for part in splits.values()] == [
        [1, 2, 3, 4, 5, 6, 7, 7],
        [],
        [8, 9],
    ]


def test_vocabularies_contain_only_training_tokens_with_ids_from_1(splits):
    vocabularies = movielens_data.build_vocabularies(splits["train"])
    assert vocabularies["user"].keys() == set(splits["train"]["user"])
    assert set(splits["test"]["user"]) - vocabularies["user"].keys()
    for ids in vocabularies.values():
        assert sorted(ids.values()) == list(range(1, len(ids) + 1))
    assert "" not in vocabularies["year"]
    assert "unknown" not in vocabularies["genres"]


def test_tokens_that_are_not_in_training_data_are_encoded_as_0(splits):
    vocabularies = movielens_data.build_vocabularies(splits["train"])
    ids = movielens_data.encode(splits["test"], vocabularies)["user"].to_numpy()
    unseen = ~splits["test"]["user"].isin(vocabularies["user"].keys())
    np.testing.assert_array_equal(ids == 0, unseen)


def test_inputs_of_selected_rows_contain_their_genres():
    vocabularies = {name: {"a": 1} for name in FIELDS} | {"genres": {"x": 1, "y": 2}}
    tokens = {name: ["a", "a", "a", "a"] for name in FIELDS}
    lists = [["y", "x"], [], ["x"], ["z"]]
    frame = pd.DataFrame({**tokens, "genres": lists, "click": [1, 0, 0, 1], "timestamp": 0})
    rows = movielens_data.convert_to_rows(movielens_data.encode(frame, vocabularies))
    inputs = rows.inputs(torch.tensor([3, 1, 0]))
    assert inputs["genres"].tolist() == [0, 2, 1]
    assert inputs["genres_offsets"].tolist() == [0, 1, 1]


def test_mask_ids_replaces_a_share_of_the_given_fields_only():
    inputs = {"user": torch.ones(10_000, dtype=torch.int64), "age": torch.ones(10_000)}
    source = torch.Generator().manual_seed(0)
    masked = movielens.mask_ids(inputs, {"user": 0.2}, source)
    # five standard deviations of a binomial share
    assert (masked["user"] == 0).double().mean().item() == pytest.approx(0.2, abs=0.02)
    assert torch.equal(masked["age"], inputs["age"])
    assert bool((inputs["user"] == 1).all())


@pytest.mark.parametrize("version", ["1.2.0", None])
def test_missing_or_other_wheel_exits_with_code_2_and_the_pip_command(
    tmp_path, monkeypatch, capsys, version
):
    def distribution(name):
        if version is None:
            raise movielens_data.metadata.PackageNotFoundError(name)
        return SimpleNamespace(version=version)

    monkeypatch.setattr(movielens_data.metadata, "distribution", distribution)
    assert main([str(tmp_path / "draft")]) == 2
    assert "pip install --no-deps recbole==1.2.1" in capsys.readouterr().err


def test_data_files_with_another_digest_are_refused(tmp_path, monkeypatch):
    class Wheel:
        version = movielens_data.VERSION

        def locate_file(self, path):
            return tmp_path / path

    folder = tmp_path / "recbole/dataset_example/ml-100k"
    folder.mkdir(parents=True)
    for name in movielens_data.FILES:
        (folder / name).write_text("user_id:token\n")
    monkeypatch.setattr(movielens_data.metadata, "distribution", lambda name: Wheel())
    with pytest.raises(movielens_data.DataMissing, match="with SHA-256"):
        movielens_data.find_data_folder()


# --- the draft -------------------------------------------------------------------------------


def test_draft_contains_exactly_the_files_of_its_manifest(draft):
    manifest = json.loads((draft / "model.json").read_text())
    listed = {"model.json", "model.safetensors", *manifest["data"].values()}
    listed |= set(manifest["vocabularies"].values())
    files = {str(path.relative_to(draft)) for path in draft.rglob("*") if path.is_file()}
    assert files == listed
    assert draft.with_name("draft.training.json").is_file()


def test_network_of_the_draft_is_built_from_its_files_and_scores_rows(draft):
    manifest = json.loads((draft / "model.json").read_text())
    signature = Signature.model_validate(manifest["signature"])
    network = DCNv2(**Network.model_validate(manifest["network"]).architecture.config)
    network.load_state_dict(load_file(draft / "model.safetensors"))
    table = pq.read_table(draft / manifest["data"]["test"])
    rows = movielens_data.convert_to_rows(table)
    inputs = rows.inputs(torch.arange(100))
    assert set(inputs) == {name for item in signature.inputs for name in tensor_names(item)}
    assert network.eval()(**inputs).isfinite().all()
    (output,) = signature.outputs
    assert {output.label, signature.group, signature.time} <= set(table.column_names)


def test_every_id_of_the_draft_is_within_its_table(draft):
    manifest = json.loads((draft / "model.json").read_text())
    weights = load_file(draft / "model.safetensors")
    for name in manifest["data"].values():
        table = pq.read_table(draft / name)
        for item in Signature.model_validate(manifest["signature"]).inputs:
            column = table[item.columns[0]].combine_chunks()
            ids = column.flatten() if pa.types.is_list(column.type) else column
            assert min(ids.to_pylist()) >= 0
            assert max(ids.to_pylist()) < len(weights[f"{item.table}.weight"])


def test_training_rows_of_the_draft_have_no_unknown_user(draft):
    train, test = (pq.read_table(draft / f"{name}.parquet")["user"] for name in ("train", "test"))
    assert min(train.to_pylist()) == 1
    assert min(test.to_pylist()) == 0


def test_calibration_rows_are_training_rows(draft):
    train, calibration = (
        pq.read_table(draft / f"{name}.parquet").drop(["genres"]).to_pandas()
        for name in ("train", "calibration")
    )
    assert len(calibration) == 4096
    assert len(calibration.merge(train.drop_duplicates())) == 4096


def test_same_seed_writes_the_same_bytes(draft, tmp_path):
    again = tmp_path / "again"
    write_draft(again, SMALL, lambda line: None)
    for path in draft.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (again / path.relative_to(draft)).read_bytes(), path.name


@pytest.mark.slow
def test_progress_is_printed_to_standard_error(tmp_path, capsys):
    assert main([str(tmp_path / "draft"), "--epochs", "1", "--seed", "3"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "epoch  1" in err
    # ``recipe`` has the settings of the training.
    assert json.loads((tmp_path / "draft.training.json").read_text())["recipe"]["seed"] == 3


@pytest.mark.slow
def test_trained_model_has_the_documented_validation_auc(tmp_path):
    # docs/results/movielens.md documents 0.724; seeds change it by 0.002, thread counts by less
    record = write_draft(tmp_path / "draft", Training(), lambda line: None)
    assert record["validation_auc"] == pytest.approx(0.724, abs=0.005)
