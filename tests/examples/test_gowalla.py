"""The second reference model: its data, its training, and the draft it leaves."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from compressors.metrics.full_ranking import RankedVectors, ranking_metrics, ranking_queries
from examples import gowalla
from examples.gowalla import DataMissing, interactions, main, read_pairs
from examples.two_tower import Training, TwoTower, train, vectors
from tasks.bundles.packing import pack

QUICK = Training(dim=8, hidden=8, batch=64, epochs=12, learning_rate=0.02)


def taste():
    """Users 0 to 59 like the items 0 to 79 that leave the same rest; each is shown some of them."""
    draw = np.random.default_rng(0)
    seen, unseen = [], []
    for user in range(60):
        liked = draw.permutation([item for item in range(80) if item % 4 == user % 4])
        seen += [(user, item) for item in liked[:14]]
        unseen += [(user, item) for item in liked[14:]]
    return np.array(seen), np.array(unseen)


def recall_at(k, query, item, what):
    """The mean recall of all queries."""
    name = f"recall@{k}"
    return float(ranking_metrics(RankedVectors(query, item, what), (name,))[name].mean())


def measured(seen, unseen):
    what = ranking_queries(interactions(unseen), [interactions(seen)], np.arange(80))

    def recall(network):
        query, item = vectors(network, {"user": torch.from_numpy(what.query)})
        return recall_at(6, query.numpy(), item.numpy(), what)

    return recall


def trained(recipe=QUICK, measure=None):
    torch.manual_seed(recipe.seed)
    network = TwoTower(users=60, items=80, dim=recipe.dim, hidden=recipe.hidden)
    seen, unseen = taste()
    messages = []
    kept = train(network, seen, recipe, measure and measured(seen, unseen), messages.append)
    return network, kept, messages


def test_training_finds_what_users_of_one_taste_have_not_seen_yet():
    network, (epoch, best), messages = trained(measure=True)
    assert best > 0.9  # chance is 6 of the 66 items that are left
    assert measured(*taste())(network) == best  # the kept epoch's weights are back
    assert 1 <= epoch <= len(messages) <= QUICK.epochs
    assert not network.query.table.sparse  # as it was built: Adam can train it


def test_a_score_is_the_dot_product_of_the_towers():
    network, _, _ = trained(Training(dim=8, hidden=8, epochs=1))
    user, item = torch.arange(60), torch.arange(60)
    with torch.no_grad():
        score = network(user=user, item=item)
        product = (network.query(user=user) * network.item(item=item)).sum(dim=1)
    torch.testing.assert_close(score, product, rtol=0, atol=0)


def test_the_same_seed_gives_the_same_network_and_no_measure_trains_to_the_end():
    first, second = (trained(Training(dim=8, epochs=4, stop_after=2)) for _ in range(2))
    assert first[1][0] == 2
    assert len(first[2]) == 2
    for name, value in first[0].state_dict().items():
        assert torch.equal(value, second[0].state_dict()[name]), name


def test_without_data_it_says_so_and_where_to_name_it(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(gowalla.VARIABLE, raising=False)
    assert main([str(tmp_path / "draft")]) == 2
    assert "name it with --data" in capsys.readouterr().err
    assert main([str(tmp_path / "draft"), "--data", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert not (tmp_path / "draft").exists()


def test_other_data_is_refused(tmp_path):
    with pytest.raises(DataMissing, match=r"neither train\.txt nor"):
        read_pairs(tmp_path, "train")
    (tmp_path / "train.txt").write_text("0 1 2\n1 5\n")
    with pytest.raises(DataMissing, match="holds 3 train pairs with SHA-256"):
        read_pairs(tmp_path, "train")


def test_a_validation_file_that_was_cut_off_is_put_back(tmp_path, monkeypatch):
    (tmp_path / "train.txt").write_text("0 1 2\n1 5\n2\n")
    (tmp_path / "valid.txt.gz").write_bytes(gzip.compress(b"0 7\n1 3\n"))
    with pytest.raises(DataMissing) as whole:
        read_pairs(tmp_path, "train")
    found = str(whole.value).split("SHA-256 ")[1].split(";")[0]
    monkeypatch.setitem(gowalla.PAIRS, "train", found)
    assert read_pairs(tmp_path, "train").tolist() == [[0, 1], [0, 2], [0, 7], [1, 3], [1, 5]]


@pytest.fixture
def data():
    root = os.environ.get(gowalla.VARIABLE)
    if root is None or not (Path(root) / "gowalla").is_dir():
        pytest.skip(f"no gowalla folder below {gowalla.VARIABLE}")
    return Path(root) / "gowalla"


@pytest.mark.data
def test_the_public_split_keeps_its_test_rows_and_loses_a_tenth_of_the_others(data):
    found = gowalla.split(data, seed=1)
    assert len(found.train) + len(found.validation) == 810_128
    assert len(found.validation) == 81_012
    assert len(found.test) == 217_242
    assert len(np.unique(found.train[:, 0])) == gowalla.USERS
    together = np.concatenate([found.train, found.validation, found.test])
    assert len(np.unique(together, axis=0)) == len(together)


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_epochs_find_more_than_popularity_and_the_draft_packs(data, tmp_path, monkeypatch):
    monkeypatch.setenv("RECPRESS_HOME", str(tmp_path / "recpress"))
    draft = tmp_path / "draft"
    assert main([str(draft), "--data", str(data), "--epochs", "2"]) == 0
    record = json.loads((tmp_path / "draft.training.json").read_text())
    splits = gowalla.split(data, seed=1)
    popular = np.bincount(splits.train[:, 1], minlength=gowalla.ITEMS).astype(np.float32)
    what = ranking_queries(
        interactions(splits.test),
        [interactions(splits.train), interactions(splits.validation)],
        np.arange(gowalla.ITEMS),
    )
    ones = np.ones((what.query.size, 1), np.float32)
    assert record["test_recall@20"] > 1.5 * recall_at(20, ones, popular[:, None], what)
    assert pack(draft).rows["items"] == gowalla.ITEMS
