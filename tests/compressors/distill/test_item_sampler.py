"""Items that are drawn from a catalogue as negatives of a retrieval batch."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from error_codes import raises_code
from safetensors.torch import save_file

from compressors.contracts import Signature, Split
from compressors.core.batches import Rows
from compressors.distill.training.item_sampler import ItemSampler, build_sampler, log_shares
from compressors.errors.steps import RowsMissing

ITEMS = 12
SIGNATURE = Signature.model_validate(
    {
        "inputs": [
            {"kind": "id", "name": "user", "table": "user"},
            {"kind": "jagged_bag", "name": "tags", "table": "tags", "shape": [3]},
            {"kind": "key", "name": "sku"},
        ],
        "outputs": [{"name": "score", "kind": "retrieval", "form": "score", "metric": "recall@5"}],
        "group": "user",
        "item": "sku",
        "towers": {
            "query": {"module": "query", "inputs": ["user"]},
            "item": {"module": "item", "inputs": ["tags"]},
        },
    }
)
SKUS = torch.arange(ITEMS) * 10 + 3


@pytest.fixture
def splits(tmp_path: Path) -> tuple[Split, Rows]:
    """A catalogue in which item ``i`` has ``i % 3`` tags, and training rows with some items.

    They are stored as prepared splits: ``@bounds/tags`` has the offsets of the lists, and
    ``@label`` and ``@group`` the labels and groups. Every tag of item ``i`` is the number ``i``.
    """
    lengths = torch.arange(ITEMS) % 3
    catalogue = {
        "sku": SKUS,
        "tags": torch.repeat_interleave(torch.arange(ITEMS), lengths),
        "@bounds/tags": torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        "@label": torch.zeros(ITEMS),
    }
    rows = {
        "user": torch.tensor([0, 1, 2, 2]),
        "sku": SKUS[[4, 4, 7, 4]],
        "@label": torch.ones(4),
        "@group": torch.tensor([0, 1, 2, 2]),
    }
    for name, tensors in (("items", catalogue), ("train", rows)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "data.safetensors")
    items, train = (
        Split(path=str(tmp_path / name), sha256="1" * 64, rows=count)
        for name, count in (("items", ITEMS), ("train", 4))
    )
    return items, Rows(train, SIGNATURE.of_split("train"))


def test_draws_have_different_items_with_their_inputs_and_shares(splits):
    sampler = ItemSampler(splits[0], SIGNATURE, splits[1], count=5)
    for _ in range(20):
        sampled = sampler.draw()
        assert len(set(sampled.item.tolist())) == 5
        assert sampled.drawn_share == 5 / ITEMS
        numbers = (sampled.item - 3) // 10  # of the items, from their ``SKUS``
        tags = [tag for n in numbers.tolist() for tag in [n] * (n % 3)]
        assert sampled.inputs["tags"].tolist() == tags
        share = {43: 3 / 4, 73: 1 / 4}  # of the training rows
        expected = torch.tensor([share.get(sku, 0.0) for sku in sampled.item.tolist()])
        torch.testing.assert_close(sampled.item_log_share.exp(), expected)


def test_every_item_is_drawn_equally_often(splits):
    sampler = ItemSampler(splits[0], SIGNATURE, splits[1], count=3)
    draws = 400
    counts = Counter(item for _ in range(draws) for item in sampler.draw().item.tolist())
    expected = draws * 3 / ITEMS
    deviation = (draws * 3 / ITEMS * (1 - 3 / ITEMS)) ** 0.5
    assert all(abs(counts[sku] - expected) < 5 * deviation for sku in SKUS.tolist())


def test_draws_depend_only_on_the_seeds(splits):
    def draws(*seeds: int) -> list[list[int]]:
        sampler = ItemSampler(splits[0], SIGNATURE, splits[1], count=4)
        sampler.draw()  # an earlier epoch
        sampler.seed(*seeds)
        return [sampler.draw().item.tolist() for _ in range(3)]

    assert draws(5, 0) == draws(5, 0)
    assert draws(5, 0) != draws(5, 1)  # another process (rank) of a distributed training
    assert draws(5, 0) != draws(6, 0)  # another epoch


def test_a_catalogue_with_fewer_items_is_drawn_completely(splits):
    sampled = ItemSampler(splits[0], SIGNATURE, splits[1], count=1_000).draw()
    assert torch.equal(sampled.item, SKUS)
    assert sampled.drawn_share == 1


def test_negatives_without_a_catalogue_are_refused(splits):
    assert build_sampler(None, SIGNATURE, splits[1], negatives=0) is None
    with raises_code(RowsMissing, "catalogue_missing", negatives=8):
        build_sampler(None, SIGNATURE, splits[1], negatives=8)


def test_log_share_of_an_item_is_the_logarithm_of_its_share_of_the_rows():
    shares = log_shares(torch.tensor([9, 2, 5]), torch.tensor([5, 9, 5, 5]))
    torch.testing.assert_close(shares.exp(), torch.tensor([0.25, 0.0, 0.75]))
