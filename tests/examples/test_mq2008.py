"""The MQ2008 example: the folds, training by query, and the written draft.

A draft is the folder of a bundle before it is packed.
"""

import gzip
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from compressors.contracts import Network, Signature
from compressors.core.smoke_test import smoke_test
from examples.mq2008 import FEATURES, RankingPerceptron, Training, main, read_fold, train


@pytest.fixture
def data(tmp_path):
    """Return five parts with 12 queries of 6 documents; feature 1 determines the relevance.

    The id of a query divided by 100 is its part.
    """
    rng = np.random.default_rng(0)
    folder = tmp_path / "mq2008"
    folder.mkdir()
    for part in range(1, 6):
        lines = []
        for query in rng.permutation(12):
            for _ in range(6):
                features = rng.random(FEATURES)
                values = " ".join(f"{i}:{value:.6f}" for i, value in enumerate(features, 1))
                relevance = int(features[0] * 3)
                # "1:9" has the form of a feature, but is in the comment, which must be ignored.
                lines.append(f"{relevance} qid:{100 * part + query} {values} #docid = x 1:9")
        text = "\n".join(lines).encode()
        if part == 1:
            (folder / "S1.txt").write_bytes(text)
        else:
            (folder / f"S{part}.txt.gz").write_bytes(gzip.compress(text))
    return folder


@pytest.mark.parametrize(
    ("fold", "expected"),
    [
        (1, {"train": {1, 2, 3}, "validation": {4}, "test": {5}}),
        (4, {"train": {4, 5, 1}, "validation": {2}, "test": {3}}),
    ],
)
def test_folds_are_rotated_parts(data, fold, expected):
    splits = read_fold(data, fold)
    assert {name: set(split.query // 100) for name, split in splits.items()} == expected
    for split in splits.values():
        assert split.features.shape == (len(split.query), FEATURES)
        parts = split.query // 100
        for part in set(parts):  # queries of a part are sorted, so each is contiguous
            assert (np.diff(split.query[parts == part]) >= 0).all()


def test_training_finds_the_feature_that_determines_the_relevance(data):
    lines = []
    settings = Training(hidden=(16,), dropout=0, batch=4, learning_rate=0.02, epochs=15)
    train(read_fold(data, 1), settings, lines.append)
    best = max(float(line.rpartition(" ")[2]) for line in lines)
    assert best > 0.9  # NDCG@10 of a random order is about 0.7


def test_draft_of_the_example_has_a_network_that_runs(data, tmp_path):
    folder = tmp_path / "draft"
    assert main([str(folder), "--data", str(data), "--epochs", "1", "--fold", "2"]) == 0
    document = json.loads((folder / "model.json").read_text())
    architecture = Network.model_validate(document["network"]).architecture
    network = RankingPerceptron(**architecture.config).eval()
    network.load_state_dict(load_file(folder / "model.safetensors"))
    smoke_test(network, Signature.model_validate(document["signature"]), architecture.path)
    assert len(pq.read_table(folder / "train.parquet")) == 3 * 12 * 6


def test_missing_part_is_an_error(data, tmp_path, capsys):
    (data / "S3.txt.gz").unlink()
    assert main([str(tmp_path / "draft"), "--data", str(data)]) == 2
    assert "S3.txt" in capsys.readouterr().err
