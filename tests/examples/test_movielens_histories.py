"""The examples on histories of MovieLens 100K: rows, padding, and the written drafts.

A draft is the folder of a bundle before it is packed.
"""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from compressors.contracts import Network, Signature
from compressors.core.smoke_test import smoke_test
from examples.din import DIN
from examples.movielens_histories import (
    LONGEST,
    SETTINGS,
    build_next_film_rows,
    list_clicks_of_people,
    list_earlier_clicks,
    pad,
    write_din,
    write_sasrec,
)
from examples.sasrec import SASRec


def test_history_has_the_known_films_clicked_at_earlier_seconds():
    frame = pd.DataFrame(
        [
            ("a", "x", 1, 10),
            ("a", "y", 1, 10),  # in the same second, so x is not yet in its history
            ("b", "x", 1, 11),
            ("a", "z", 0, 12),  # no click
            ("a", "new", 1, 13),  # no known film
            ("a", "x", 1, 14),
        ],
        columns=["user", "item", "click", "timestamp"],
    )
    histories = list_earlier_clicks(frame, {"x": 1, "y": 2, "z": 3})
    assert histories == [[], [], [], [1, 2], [1, 2], [1, 2]]


def test_history_has_the_latest_films_only():
    count = LONGEST + 3
    frame = pd.DataFrame({"user": "a", "item": [str(k) for k in range(count)], "click": 1})
    frame["timestamp"] = range(count)
    histories = list_earlier_clicks(frame, {str(k): k for k in range(count)})
    assert histories[-1] == list(range(count - 1 - LONGEST, count - 1))


@pytest.mark.parametrize("left", [True, False])
def test_padding_has_id_0_and_mask_0_on_the_chosen_side(left):
    ids, mask = pad([[4, 5], [], [6]], left=left)
    assert ids.tolist() == ([[4, 5], [0, 0], [0, 6]] if left else [[4, 5], [0, 0], [6, 0]])
    torch.testing.assert_close(mask, (ids > 0).float())


def test_last_films_are_the_test_and_validation_rows():
    sequences = [[1, 2, 3, 4], [5, 6, 7]]
    rows = {
        split: build_next_film_rows(sequences, split).to_pylist()
        for split in ("train", "validation")
    }
    assert rows["train"] == [{"person": 0, "item": 2, "history": [1]}]
    assert rows["validation"] == [
        {"person": 0, "item": 3, "history": [1, 2]},
        {"person": 1, "item": 6, "history": [5]},
    ]
    assert build_next_film_rows(sequences, "test").to_pylist()[1] == {
        "person": 1,
        "item": 7,
        "history": [5, 6],
    }


def test_people_with_fewer_than_three_clicks_are_left_out():
    frame = pd.DataFrame(
        {"user": list("aaabbccc"), "item": list("xyzxyxyz"), "click": [1, 1, 1, 1, 1, 1, 0, 1]}
    )
    sequences, rows = list_clicks_of_people(frame)
    assert sequences == [[1, 2, 3]]
    assert rows == 4  # three films, and padding


@torch.no_grad()
def test_sasrec_depends_on_the_order_of_films_but_not_on_padding_or_later_films():
    torch.manual_seed(0)
    network = SASRec(items=20, longest=8, dim=8).eval()
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.5)  # large enough that every position matters
    history = torch.tensor([[3, 7, 9]])
    alone = network.query(history, torch.ones_like(history))
    padded = torch.tensor([[0, 0, 3, 7, 9]])
    torch.testing.assert_close(network.query(padded, (padded > 0).long()), alone)
    assert not torch.allclose(network.query(history.flip(1), torch.ones_like(history)), alone)
    # The vectors at the position of film 7, before two different films.
    at_7 = [
        network.query.compute_all_vectors(torch.tensor([[3, 7, later]]), torch.ones(1, 3).long())[
            :, 1
        ]
        for later in (9, 11)
    ]
    torch.testing.assert_close(at_7[0], at_7[1], rtol=0, atol=0)


SMALL = {"dim": 8, "epochs": 1, "batch": 4096}


def load(folder, network_class):
    """Return the network and the signature of a draft; tied weights are loaded once."""
    document = json.loads((folder / "model.json").read_text())
    network = Network.model_validate(document["network"])
    model = network_class(**network.architecture.config).eval()
    missing = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    assert set(missing.missing_keys) == set(network.ties)
    assert not missing.unexpected_keys
    return model, Signature.model_validate(document["signature"])


@pytest.mark.slow
def test_draft_of_din_has_a_network_that_runs(tmp_path):
    write_din(tmp_path / "draft", replace(SETTINGS["din"], **SMALL), lambda line: None)
    network, signature = load(tmp_path / "draft", DIN)
    smoke_test(network, signature, "examples.din:DIN")
    test = pq.read_table(tmp_path / "draft" / "test.parquet")
    assert len(test) == 19_997
    # Most people of the test rows have rated films there only, so histories grow within the rows.
    assert np.mean([len(history) for history in test["history"].to_pylist()]) > 20


@pytest.mark.slow
def test_draft_of_sasrec_has_a_network_that_runs(tmp_path):
    write_sasrec(tmp_path / "draft", replace(SETTINGS["sasrec"], **SMALL), lambda line: None)
    network, signature = load(tmp_path / "draft", SASRec)
    smoke_test(network, signature, "examples.sasrec:SASRec")
    assert len(pq.read_table(tmp_path / "draft" / "test.parquet")) > 900  # of 943 people
