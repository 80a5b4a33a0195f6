"""The Gowalla example: reading and splitting the data, training, and the written draft.

A draft is the folder of a bundle before it is packed.
"""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from compressors.metrics.full_ranking import RankedVectors, ranking_metrics, ranking_queries
from examples import gowalla
from examples.gowalla import main, read_pairs, to_interactions
from examples.public_data import DATA_VARIABLE, DataMissing
from examples.two_tower import Training, TwoTower, compute_vectors, train
from tasks.bundles.packing import pack

QUICK = Training(dim=8, hidden=8, batch=64, epochs=12, learning_rate=0.02)


def synthetic_pairs():
    """Return seen and unseen pairs of 60 users, who like the items with the same remainder mod 4.

    Each user likes 20 of the 80 items: 14 of them are seen, 6 unseen.
    """
    rng = np.random.default_rng(0)
    seen, unseen = [], []
    for user in range(60):
        liked = rng.permutation([item for item in range(80) if item % 4 == user % 4])
        seen += [(user, item) for item in liked[:14]]
        unseen += [(user, item) for item in liked[14:]]
    return np.array(seen), np.array(unseen)


def recall_at(k, query, item, queries):
    """Return the mean recall@k over all queries."""
    name = f"recall@{k}"
    return float(ranking_metrics(RankedVectors(query, item, queries), (name,))[name].mean())


def build_recall_measure(seen, unseen):
    """Return a function that computes a network's recall@6 on the unseen pairs."""
    queries = ranking_queries(to_interactions(unseen), [to_interactions(seen)], np.arange(80))

    def recall(network):
        query, item = compute_vectors(network, {"user": torch.from_numpy(queries.query)})
        return recall_at(6, query.numpy(), item.numpy(), queries)

    return recall


def train_synthetic(settings=QUICK, has_metric=False):
    """Train on synthetic pairs; return the network, the result of ``train`` and its messages."""
    torch.manual_seed(settings.seed)
    network = TwoTower(users=60, items=80, dim=settings.dim, hidden=settings.hidden)
    seen, unseen = synthetic_pairs()
    messages = []
    measure = build_recall_measure(seen, unseen) if has_metric else None
    selected = train(network, seen, settings, measure, messages.append)
    return network, selected, messages


def test_train_returns_the_best_epoch_and_restores_its_weights():
    network, (epoch, best), messages = train_synthetic(has_metric=True)
    assert best > 0.9  # chance: 6 of 66 unseen items
    # The network has the weights of the selected epoch.
    assert build_recall_measure(*synthetic_pairs())(network) == best
    assert 1 <= epoch <= len(messages) <= QUICK.epochs
    assert not network.query.table.sparse  # ``train`` enables sparse gradients only in an epoch


def test_score_is_the_dot_product_of_the_towers():
    network, _, _ = train_synthetic(Training(dim=8, hidden=8, epochs=1))
    user, item = torch.arange(60), torch.arange(60)
    with torch.no_grad():
        score = network(user=user, item=item)
        product = (network.query(user=user) * network.item(item=item)).sum(dim=1)
    torch.testing.assert_close(score, product, rtol=0, atol=0)


def test_training_without_a_metric_runs_all_epochs_and_is_reproducible():
    # ``stop_after`` replaces ``epochs`` as the number of epochs to train.
    settings = Training(dim=8, epochs=4, stop_after=2)
    network, (epoch, _), messages = train_synthetic(settings)
    same_network, _, _ = train_synthetic(settings)
    assert epoch == len(messages) == 2
    for name, value in network.state_dict().items():
        assert torch.equal(value, same_network.state_dict()[name]), name


def test_missing_data_exits_with_code_2_and_mentions_the_option(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    assert main([str(tmp_path / "draft")]) == 2
    assert "Pass the folder with --data" in capsys.readouterr().err
    assert main([str(tmp_path / "draft"), "--data", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert not (tmp_path / "draft").exists()


def test_other_data_than_the_public_split_is_refused(tmp_path):
    with pytest.raises(DataMissing, match=r"Expected train\.txt or"):
        read_pairs(tmp_path, "train")
    (tmp_path / "train.txt").write_text("0 1 2\n1 5\n")
    with pytest.raises(DataMissing, match="got 3 pairs with SHA-256"):
        read_pairs(tmp_path, "train")


def test_pairs_of_valid_txt_are_added_to_the_training_pairs(tmp_path, monkeypatch):
    (tmp_path / "train.txt").write_text("0 1 2\n1 5\n2\n")
    (tmp_path / "valid.txt.gz").write_bytes(gzip.compress(b"0 7\n1 3\n"))
    with pytest.raises(DataMissing) as caught:
        read_pairs(tmp_path, "train")
    digest = str(caught.value).rpartition("SHA-256 ")[2].partition(".")[0]
    monkeypatch.setitem(gowalla.PAIR_HASHES, "train", digest)
    assert read_pairs(tmp_path, "train").tolist() == [[0, 1], [0, 2], [0, 7], [1, 3], [1, 5]]


@pytest.fixture
def data():
    root = os.environ.get(DATA_VARIABLE)
    if root is None or not (Path(root) / "gowalla").is_dir():
        pytest.skip(f"no gowalla folder below {DATA_VARIABLE}")
    return Path(root) / "gowalla"


@pytest.mark.data
def test_split_takes_a_tenth_of_the_public_training_pairs_for_validation(data):
    splits = gowalla.split(data, seed=1)
    assert len(splits.train) + len(splits.validation) == 810_128
    assert len(splits.validation) == 81_012
    assert len(splits.test) == 217_242
    assert len(np.unique(splits.train[:, 0])) == gowalla.USERS
    all_pairs = np.concatenate([splits.train, splits.validation, splits.test])
    assert len(np.unique(all_pairs, axis=0)) == len(all_pairs)


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_epochs_beat_the_popularity_ranking_and_the_draft_can_be_packed(
    data, tmp_path, monkeypatch
):
    monkeypatch.setenv("RECPRESS_HOME", str(tmp_path / "recpress"))
    draft = tmp_path / "draft"
    assert main([str(draft), "--data", str(data), "--epochs", "2"]) == 0
    record = json.loads((tmp_path / "draft.training.json").read_text())
    splits = gowalla.split(data, seed=1)
    popularity = np.bincount(splits.train[:, 1], minlength=gowalla.ITEMS).astype(np.float32)
    queries = ranking_queries(
        to_interactions(splits.test),
        [to_interactions(splits.train), to_interactions(splits.validation)],
        np.arange(gowalla.ITEMS),
    )
    ones = np.ones((queries.query.size, 1), np.float32)
    assert record["test_recall@20"] > 1.5 * recall_at(20, ones, popularity[:, None], queries)
    assert pack(draft).rows["items"] == gowalla.ITEMS
