"""Lookup counts and squared gradients of tables, their parts, and bags.

Some steps replace a table by a composition of smaller tables, its parts (``Unit.part_of``). The
networks are in ``tests/models.py``: ``RANKER`` has the tables ``NAMES``; ``genres``, ``history``
and ``tags`` are bags, and ``user`` has 40 rows.
"""

import pytest
import torch
from error_codes import raises_code
from models import ATTENTION, BENCH_ROWS, RANKER, TIED, Step

from compressors.contracts import Bench
from compressors.core.batches import Rows, batches
from compressors.core.modules.formats import Bag
from compressors.core.runner import run
from compressors.core.units import Unit, private_copy, replace_parameter, table_rows
from compressors.errors.steps import RowsMissing
from compressors.factorize.low_rank import LowRank
from compressors.factorize.multi_hash import MultiHash, hash_ids
from compressors.factorize.quotient_remainder import QuotientRemainder
from compressors.prune.tables.cluster_rows import ClusterRows
from compressors.prune.tables.prune_rows import PruneRows
from compressors.prune.tables.tiers import Tiers
from compressors.quantize.calibration.lookup_counts import lookup_counts, squared_gradients
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8
from compressors.task_kinds.loss import hard_loss

NAMES = ("user", "item", "city", "genres", "history", "tags")


def expected_counts(bench: Bench, name: str, table_size: int) -> torch.Tensor:
    """The lookup counts of a table's input, computed from the ids in the training data."""
    (rows,) = batches(bench.train, bench.signature, BENCH_ROWS)
    ids = rows.inputs[name].reshape(-1).long()
    if name == "genres":
        ids = ids[ids != 0]  # its padding
    return torch.bincount(ids, minlength=table_size).double()


@pytest.mark.parametrize(
    "earlier_step", [None, RowwiseInt8(), LowRank()], ids=lambda s: s and s.kind
)
def test_lookup_counts_equal_the_ids_in_the_data_for_each_table_format(earlier_step, tmp_path):
    bench, model = RANKER.bench(tmp_path / "data"), RANKER.model()
    if earlier_step is not None:
        model = run(earlier_step, model, bench, tmp_path / "earlier_step")
    counts = lookup_counts(model, bench, NAMES)
    assert set(counts) == set(NAMES)
    rows_of_table = table_rows(model.module)
    for name in NAMES:
        assert torch.equal(counts[name], expected_counts(bench, name, rows_of_table[name]))


def test_the_part_of_a_low_rank_table_has_the_lookup_counts_of_the_table(tmp_path):
    bench = RANKER.bench(tmp_path / "data")
    model = run(LowRank(), RANKER.model(), bench, tmp_path / "out")
    counts = lookup_counts(model, bench, ["item", "item.narrow"])
    assert torch.equal(counts["item"], counts["item.narrow"])


NESTED: tuple[Step, ...] = (
    Tiers(tables=("user", "item", "genres", "tags"), hot=0.2),
    PruneRows(tables=("item.hot", "history"), keep=0.4, pruned="shared"),
    ClusterRows(tables=("genres.table.cold",), hot=0.4, clusters=3),
    LowRank(tables=("item.cold",)),
    QuotientRemainder(tables=("user.cold", "tags.table.hot")),
)


def test_a_part_counts_only_lookups_whose_values_depend_on_its_row(tmp_path):
    """The test changes each row of each part, and adds the counts of the table rows that change."""
    bench, model = RANKER.bench(tmp_path / "data"), RANKER.model()
    before = lookup_counts(model, bench, NAMES)
    for number, step in enumerate(NESTED):
        model = run(step, model, bench, tmp_path / str(number))
    owners = {unit.name: unit.part_of for unit in Unit.of(model.module) if unit.part_of}
    counts, module = lookup_counts(model, bench, owners), private_copy(model.module)
    assert set(counts) == set(owners)
    for name, count in counts.items():
        part, owner = module.get_submodule(name), module.get_submodule(owners[name])
        if not isinstance(part, torch.nn.Embedding):
            continue  # a composed part, whose parts are checked
        table = owner.table if isinstance(owner, Bag) else owner
        ids = torch.arange(table.rows)
        rows_before, weight = table(ids), part.weight
        for row in range(part.num_embeddings):
            changed_weight = weight.detach().clone()
            changed_weight[row] += 1 + changed_weight[row].abs()
            replace_parameter(part, "weight", changed_weight)
            is_affected = (table(ids) != rows_before).any(dim=1)
            assert float(count[row]) == float(before[owners[name]][is_affected].sum()), (name, row)
        part.weight = weight


def test_a_bucket_counts_the_lookups_of_every_hash(tmp_path):
    bench, step = RANKER.bench(tmp_path / "data"), MultiHash(tables=("user",), hashes=3)
    model = run(step, RANKER.model(), bench, tmp_path / "out")
    counts = lookup_counts(model, bench, ["user", "user.buckets"])
    buckets_of_ids = hash_ids(torch.arange(40), model.module.user.functions, 20)
    expected = [
        float((counts["user"].unsqueeze(1) * (buckets_of_ids == bucket)).sum())
        for bucket in range(20)
    ]
    assert counts["user.buckets"].tolist() == expected


def test_a_table_with_two_inputs_counts_the_lookups_of_both(tmp_path):
    bench = TIED.bench(tmp_path / "data")
    (rows,) = batches(bench.train, bench.signature, BENCH_ROWS)
    ids = torch.cat([rows.inputs["user"], rows.inputs["friend"]])
    counts = lookup_counts(TIED.model(), bench, ["user"])
    assert torch.equal(counts["user"], torch.bincount(ids, minlength=20).double())


def test_lookup_counts_leaves_no_hook_on_the_model(tmp_path):
    model = RANKER.model()
    lookup_counts(model, RANKER.bench(tmp_path / "data"), ["user"])
    assert not model.module.user._forward_pre_hooks


def test_lookup_counts_without_training_rows_raises_rows_missing():
    with raises_code(RowsMissing, "lookup_counts_need_rows"):
        lookup_counts(RANKER.model(), Bench(signature=RANKER.signature), ["user"])


# --- squared gradients -----------------------------------------------------------------------


def mean_squared_gradients(bench: Bench, model, name: str) -> torch.Tensor:
    """Mean squared gradient of a table by autograd, one row of the data at a time."""
    rows = Rows(bench.train, bench.signature)
    module = model.private().module.requires_grad_(True)
    weight = module.get_submodule(name).weight
    total = torch.zeros(weight.shape, dtype=torch.float64)
    for number in range(len(rows)):
        batch = rows.take(torch.tensor([number]))
        loss = hard_loss(bench.signature, module(**batch.inputs), batch)
        (grad,) = torch.autograd.grad(loss, [weight])
        total += grad.double().square()
    return (total / len(rows)).float()


@pytest.mark.parametrize("name", ["user", "item", "city"])
def test_squared_gradients_equal_the_mean_over_single_rows(name, tmp_path):
    bench, model = RANKER.bench(tmp_path / "data"), RANKER.model()
    result = squared_gradients(model, bench, [name])[name]
    # float32 gradients of the batch against those of single rows
    torch.testing.assert_close(
        result, mean_squared_gradients(bench, model, name), rtol=1e-4, atol=1e-10
    )


def test_rows_that_a_bag_does_not_read_have_no_squared_gradient(tmp_path):
    bench, model = RANKER.bench(tmp_path / "data"), RANKER.model()
    result = squared_gradients(model, bench, NAMES)
    for name in ("genres", "history", "tags"):
        is_looked_up = lookup_counts(model, bench, [name])[name] > 0
        has_gradient = result[name].sum(dim=1) > 0
        assert has_gradient.any()
        assert not (has_gradient & ~is_looked_up).any(), name
    assert not result["genres"][0].any()


def test_squared_gradients_of_lists_equal_the_mean_over_single_lists(tmp_path):
    bench = ATTENTION.bench(tmp_path / "data")
    result = squared_gradients(ATTENTION.model(), bench, ["user"])["user"]
    module = ATTENTION.model().module
    data = Rows(bench.train, bench.signature)
    total = torch.zeros(25, 8, dtype=torch.float64)  # the shape of the table ``user``
    for group in data.group.unique():
        row_numbers = (data.group == group).nonzero().squeeze(1)
        batch = data.take(row_numbers)
        looked_up = module.user(batch.inputs["user"]).detach().requires_grad_(True)
        with torch.no_grad():
            rows = module.item(batch.inputs["history"])
        keys, values = torch.relu(module.key(rows)), module.value(rows)
        attention = (keys * looked_up.unsqueeze(1)).sum(dim=2).softmax(dim=1)
        scores = module.out(torch.matmul(attention.unsqueeze(1), values).squeeze(1))
        (grad,) = torch.autograd.grad(hard_loss(bench.signature, scores, batch), [looked_up])
        total.index_add_(0, batch.inputs["user"], grad.double().square())
    expected_squares = (total / len(data.group.unique())).float()
    torch.testing.assert_close(result, expected_squares, rtol=1e-3, atol=1e-10)


def test_squared_gradients_without_training_rows_raises_rows_missing():
    with raises_code(RowsMissing, "gradients_need_rows"):
        squared_gradients(RANKER.model(), Bench(signature=RANKER.signature), ["user"])
