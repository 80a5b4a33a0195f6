"""``derive_inputs`` calls a network on sampled rows to find the kind of each input.

Each small network here reads the columns of its data in one way. An ``IdField`` is the part of a
table that one column of an input looks up.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from error_codes import TextMatching, raises_code
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from compressors.contracts import (
    DenseInput,
    IdField,
    IdInput,
    IntegerInput,
    JaggedBag,
    MatrixInput,
    PaddedBag,
    SequenceInput,
)
from compressors.errors.inspection import InspectionFailed
from compressors.inspection.inputs import DerivedInputs, derive_inputs
from compressors.inspection.outputs import named_scores
from compressors.inspection.sample import Sample, SampleColumn

ROWS, USERS, ITEMS = 64, 40, 30
rng = np.random.default_rng(0)


def integers(name: str, low: int, high: int) -> SampleColumn:
    """A column of integers from ``low`` to ``high``."""
    values = rng.integers(low, high + 1, ROWS)
    return SampleColumn(name, "integer", values, low=low, high=high)


def lists(name: str, shortest: int, longest: int, rows: int = ITEMS) -> SampleColumn:
    """A column of lists with ids from 1."""
    lengths = rng.integers(shortest, longest + 1, ROWS)
    values = tuple(rng.integers(1, rows, length) for length in lengths)
    return SampleColumn(name, "integer_list", values, shortest, longest, low=1, high=rows - 1)


SAMPLE: Sample = {
    column.name: column
    for column in (
        integers("user", 0, USERS - 1),
        integers("item", 0, ITEMS - 1),
        integers("hour", 0, 23),
        integers("orders", 0, 99),
        SampleColumn("price", "float", rng.random(ROWS, np.float32)),
        SampleColumn("age", "float", rng.random(ROWS, np.float32)),
        lists("seen", 2, 6),
        lists("fixed", 5, 5),
    )
}


def derive(network: nn.Module, sample: Sample = SAMPLE, **named: str) -> DerivedInputs:
    """Derive the inputs; ``named`` has the columns that the user names for an argument.

    They are separated by commas, such as ``ids="user,item"``. ``lengths(seen)`` stands for the
    lengths of the lists in the column ``seen``. Any other argument reads the column of its name.
    """
    torch.manual_seed(0)
    columns = {argument: tuple(value.split(",")) for argument, value in named.items()}
    return derive_inputs(network.eval(), sample, columns, excluded=())


class TwoTables(nn.Module):
    """Read an id in two tables, and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.deep, self.wide = nn.Embedding(USERS, 4), nn.Embedding(USERS, 1)
        self.out = nn.Linear(5, 1)

    def forward(self, user: Tensor, price: Tensor) -> Tensor:
        return self.wide(user) + self.out(torch.cat([self.deep(user), price], dim=1))


def test_id_has_all_tables_and_number_is_dense():
    derived = derive(TwoTables())
    assert derived.call.form == "keywords"
    assert derived.inputs == (
        IdInput(name="user", table="wide", more_tables=("deep",)),  # in the order of the lookups
        DenseInput(name="price", shape=(1,)),
    )


def test_columns_of_other_names_are_named_by_the_user():
    derived = derive(TwoTables(), user="item", price="age")
    assert [item.columns for item in derived.inputs] == [("item",), ("age",)]


class JoinedTable(nn.Module):
    """Read two ids in parts of one table, and integers as numbers and as one-hot vectors."""

    def __init__(self, offset: int = USERS) -> None:
        super().__init__()
        self.joined = nn.Embedding(USERS + ITEMS, 4)
        self.register_buffer("offsets", torch.tensor([0, offset]))
        self.out = nn.Linear(8 + 24 + 1, 1)

    def forward(self, ids: Tensor, hour: Tensor, count: Tensor) -> Tensor:
        rows = self.joined(ids + self.offsets).flatten(1)
        one_hot = nn.functional.one_hot(hour, 24).float()
        return self.out(torch.cat([rows, one_hot, count], dim=1))


def test_joined_table_has_fields_and_integers_are_bounded_or_dense():
    derived = derive(JoinedTable(), ids="user,item", count="orders")
    assert derived.inputs == (
        IdInput(
            name="ids",
            columns=("user", "item"),
            shape=(2,),
            table="joined",
            fields=(IdField(rows=USERS), IdField(rows=ITEMS, offset=USERS)),
        ),
        IntegerInput(name="hour", low=0, high=23),
        DenseInput(name="count", columns=("orders",), shape=(1,)),
    )


@given(offset=st.integers(0, USERS))
def test_any_offset_of_a_field_is_found(offset):
    (item, *_) = derive(JoinedTable(offset), ids="user,item", count="orders").inputs
    expected = [0, offset] if offset else []
    assert [field.offset for field in item.fields] == expected


class Matrix(nn.Module):
    """Read ids, numbers and a list from one float matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.items = nn.Embedding(USERS, 4), nn.Embedding(ITEMS, 4)
        self.out = nn.Linear(9, 1)

    def forward(self, x: Tensor) -> Tensor:
        bag = self.items(x[:, 1:6].long()).mean(dim=1)
        return self.out(torch.cat([self.user(x[:, 0].long()), bag, x[:, 6:]], dim=1))


def test_matrix_has_a_part_for_each_column():
    (item,) = derive(Matrix(), x="user,fixed,price").inputs
    assert item == MatrixInput(
        name="x",
        fields=(
            IdInput(name="user", table="user"),
            PaddedBag(name="fixed", shape=(5,), table="items"),
            DenseInput(name="price", shape=(1,)),
        ),
    )


class MatrixOfIds(nn.Module):
    """Read ids from a matrix that must be float, as models of DeepCTR-Torch do."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(USERS, 1), nn.Embedding(ITEMS, 1)

    def forward(self, x: Tensor) -> Tensor:
        score = torch.zeros_like(x[:, :1])
        score += self.user(x[:, 0].long())  # fails for integers, which have no fractions
        return score + self.item(x[:, 1].long())


def test_matrix_with_only_ids_is_float_if_the_network_fails_for_integers():
    (item,) = derive(MatrixOfIds(), x="user,item").inputs
    fields = (IdInput(name="user", table="user"), IdInput(name="item", table="item"))
    assert item == MatrixInput(name="x", fields=fields)
    assert item.dtype == "float32"


class AuxiliaryLoss(nn.Module):
    """Return a score for each row, and a loss, as DIEN of torch-rechub does."""

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Embedding(USERS, 1)

    def forward(self, user: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.user(user)
        return scores, scores.mean()


def test_network_that_also_returns_a_number_for_the_batch_has_inputs_but_no_outputs():
    derived = derive(AuxiliaryLoss())
    with raises_code(
        InspectionFailed, "outputs_unknown", got=TextMatching(r"\(64, 1\), a tensor \(\)")
    ):
        named_scores(derived.returned, ROWS, "AuxiliaryLoss")


class Mapping(nn.Module):
    """Read some entries of a mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Embedding(USERS, 1)

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        return self.user(x["user"]) + x["price"] + 0 * x["age"]


def test_mapping_has_the_entries_that_are_read_and_those_without_effect_are_listed():
    derived = derive(Mapping())
    assert derived.call.form == "mapping"
    assert [item.name for item in derived.inputs] == ["user", "price", "age"]
    assert derived.unused == ("age",)


class Pooled(nn.Module):
    """Mean of a list without id 0."""

    def __init__(self) -> None:
        super().__init__()
        self.item = nn.Embedding(ITEMS, 4)
        self.out = nn.Linear(4, 1)

    def forward(self, seen: Tensor) -> Tensor:
        is_item = (seen != 0).unsqueeze(2)
        return self.out((self.item(seen) * is_item).sum(dim=1) / is_item.sum(dim=1))


def test_list_without_order_is_a_padded_bag():
    assert derive(Pooled()).inputs == (PaddedBag(name="seen", shape=(6,), table="item"),)


class Weighted(Pooled):
    """Mean of a list whose ids have weights by their place from the left or from the right."""

    def __init__(self, *, from_right: bool) -> None:
        super().__init__()
        self.from_right = from_right

    def forward(self, seen: Tensor) -> Tensor:
        weights = torch.arange(1, seen.shape[1] + 1).flip(0) if self.from_right else None
        weights = 1.0 / (torch.arange(1, seen.shape[1] + 1) if weights is None else weights)
        is_item = (seen != 0) * weights
        return self.out((self.item(seen) * is_item.unsqueeze(2)).sum(dim=1))


@pytest.mark.parametrize(("from_right", "side"), [(False, "right"), (True, "left")])
def test_list_with_order_is_a_sequence_padded_where_padding_has_no_effect(from_right, side):
    (item,) = derive(Weighted(from_right=from_right)).inputs
    assert item == SequenceInput(name="seen", shape=(6,), table="item", min_length=2, padding=side)


class Recurrent(nn.Module):
    """Last state of a GRU, which padding changes."""

    def __init__(self) -> None:
        super().__init__()
        self.item = nn.Embedding(ITEMS, 4)
        self.gru, self.out = nn.GRU(4, 4, batch_first=True), nn.Linear(4, 1)

    def forward(self, seen: Tensor) -> Tensor:
        return self.out(self.gru(self.item(seen))[0][:, -1])


def test_network_that_padding_changes_needs_lists_of_one_length():
    with raises_code(InspectionFailed, "padding_matters", column="seen", shortest=2, longest=6):
        derive(Recurrent())
    assert derive(Recurrent(), seen="fixed").inputs == (
        PaddedBag(name="seen", columns=("fixed",), shape=(5,), table="item"),
    )


class Attention(nn.Module):
    """Mean of the items and their places, in two lists of equal lengths, where a mask is set."""

    def __init__(self, dtype: torch.dtype, positions: int) -> None:
        super().__init__()
        self.item, self.place = nn.Embedding(ITEMS, 4), nn.Embedding(positions, 4)
        self.out = nn.Linear(4, 1)
        self.dtype = dtype

    def forward(
        self, seen: Tensor, seen_mask: Tensor, seen_positions: Tensor, other: Tensor, count: Tensor
    ) -> Tensor:
        if seen_mask.dtype != self.dtype:
            raise TypeError(f"expected {self.dtype}")
        both = self.item(seen) + self.place(seen_positions) + self.item(other) * 2
        return self.out((both * seen_mask.unsqueeze(2)).sum(dim=1) / count.unsqueeze(1))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
# The longest list has 6 ids. A table of 7 positions has a row 0 for padding, one of 6 has none.
@pytest.mark.parametrize(("positions", "first"), [(7, 1), (6, 0)])
def test_sequence_has_its_mask_positions_and_lengths(dtype, positions, first):
    sample = {
        "seen": SAMPLE["seen"],
        "other": replace(SAMPLE["seen"], name="other"),
    }
    derived = derive(Attention(dtype, positions), sample, count="lengths(other)")
    assert derived.inputs == (
        SequenceInput(
            name="seen",
            shape=(6,),
            table="item",
            min_length=2,
            mask="seen_mask",
            mask_dtype=str(dtype).removeprefix("torch."),
            positions="seen_positions",
            first_position=first,
        ),
        SequenceInput(
            name="other",
            shape=(6,),
            table="item",
            min_length=2,
            lengths="count",
            same_length_as="seen",
            mask_dtype=derived.inputs[1].mask_dtype,
        ),
    )


class Bag(nn.Module):
    """Sum of concatenated lists."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(ITEMS, 1, mode="sum")

    def forward(self, seen: Tensor, seen_offsets: Tensor) -> Tensor:
        return self.bag(seen, seen_offsets)


def test_list_with_offsets_is_a_jagged_bag():
    assert derive(Bag()).inputs == (JaggedBag(name="seen", shape=(6,), table="bag"),)


def test_constant_id_is_found_by_its_value():
    constant = replace(SAMPLE["user"], values=np.full(ROWS, USERS - 1))
    (item, _) = derive(TwoTables(), {**SAMPLE, "user": constant}).inputs
    assert item.table in ("deep", "wide")
    assert len(item.more_tables) == 1


class Hashed(nn.Module):
    """Read the remainder of an integer in a table."""

    def __init__(self) -> None:
        super().__init__()
        self.day = nn.Embedding(7, 1)

    def forward(self, hour: Tensor) -> Tensor:
        return self.day(hour % 7)


def test_integer_from_which_rows_are_computed_has_the_bounds_of_the_data():
    assert derive(Hashed()).inputs == (IntegerInput(name="hour", low=0, high=23),)


def test_argument_without_a_column_raises():
    with raises_code(
        InspectionFailed, "arguments_unknown", names=("ids", "count"), architecture="JoinedTable"
    ):
        derive(JoinedTable())


def test_argument_that_the_network_does_not_have_raises_with_those_it_has():
    fields = {"names": ("count",), "arguments": ("user", "price")}
    with raises_code(InspectionFailed, "inputs_unknown", method="forward", **fields):
        derive(TwoTables(), count="item")


def test_unknown_column_raises():
    with raises_code(InspectionFailed, "columns_missing", name="ids", missing=("buyer",)):
        derive(JoinedTable(), ids="buyer,item", count="orders")


def test_network_that_fails_raises_with_its_error():
    with raises_code(InspectionFailed, "network_fails", problem=TextMatching("index out of range")):
        derive(TwoTables(), {**SAMPLE, "user": integers("user", USERS, USERS + 5)})


class AnyArguments(nn.Module):
    """Take any arguments."""

    def forward(self, **inputs: Tensor) -> Tensor:
        return inputs["price"]


def test_network_with_any_arguments_raises():
    with raises_code(InspectionFailed, "arguments_variable", name="inputs"):
        derive(AnyArguments())


class WithLabels(nn.Module):
    """Take the labels too, as networks that compute their loss do."""

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Embedding(USERS, 1)

    def forward(self, user: Tensor, price: Tensor, hour: Tensor | None = None) -> Tensor:
        return self.user(user) + price


def test_labels_are_no_input_of_an_optional_argument_or_of_a_pattern():
    derived = derive_inputs(WithLabels().eval(), SAMPLE, {}, excluded=("hour",))
    assert [item.name for item in derived.inputs] == ["user", "price"]
    # The pattern matches the columns ``price`` and ``age``.
    by_pattern = derive_inputs(WithLabels().eval(), SAMPLE, {"price": ("*e",)}, excluded=("age",))
    assert by_pattern.inputs[1].columns == ("price",)


class ThreeArguments(nn.Module):
    """Read parts of one table by several arguments, and the same parts of a second table.

    Ids of ``item`` begin at ``first_item``. In the second table, all parts are ``second`` rows
    later.
    """

    def __init__(self, *, second: int = 0, first_item: int = 1) -> None:
        super().__init__()
        self.first_item = first_item
        self.joined = nn.Embedding(USERS + ITEMS + 24, 1)
        self.other = nn.Embedding(USERS + ITEMS + 24 + second, 1)
        self.second = second

    def forward(self, user: Tensor, item: Tensor, hour: Tensor) -> Tensor:
        rows = [user, item + USERS - self.first_item, hour + USERS + ITEMS]
        return sum(self.joined(row) + self.other(row + self.second) for row in rows)


def test_columns_of_several_arguments_share_a_table():
    sample = {**SAMPLE, "item": integers("item", 1, ITEMS)}
    fields = [item.fields for item in derive(ThreeArguments(), sample).inputs]
    assert fields == [
        (IdField(rows=USERS),),
        (IdField(rows=ITEMS + 1, offset=USERS - 1),),  # with id 0, which the data does not have
        (IdField(rows=24, offset=USERS + ITEMS),),
    ]


class LastItem(ThreeArguments):
    """Read items of two columns in the same part of a table."""

    def forward(self, user: Tensor, item: Tensor, hour: Tensor) -> Tensor:
        rows = [user, item + USERS, hour + USERS]
        return sum(self.joined(row) for row in rows)


def test_columns_with_one_offset_have_the_same_valid_ids():
    sample = {**SAMPLE, "hour": integers("hour", 3, 20)}  # ids of items, in place of hours
    fields = [item.fields for item in derive(LastItem(), sample).inputs]
    # No other part follows, so the items may have all other rows of the table.
    of_items = (IdField(rows=ITEMS + 24, offset=USERS),)
    assert fields == [(IdField(rows=USERS),), of_items, of_items]


def test_rows_of_a_column_end_before_id_0_of_the_next():
    sample = {**SAMPLE, "hour": integers("hour", 3, 20)}
    fields = [item.fields for item in derive(ThreeArguments(first_item=0), sample).inputs]
    assert fields[1] == (IdField(rows=ITEMS, offset=USERS),)  # not the rows of hour 0 to 2


def test_different_offsets_of_one_column_raise():
    sample = {**SAMPLE, "item": integers("item", 1, ITEMS)}
    with raises_code(InspectionFailed, "offsets_differ", column="user"):
        derive(ThreeArguments(second=3), sample)


class FromOne(nn.Module):
    """Read ids that begin at 1."""

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Embedding(USERS, 1)

    def forward(self, user: Tensor) -> Tensor:
        return self.user(user - 1)


def test_ids_from_one_have_a_first_id():
    (item,) = derive(FromOne(), {"user": integers("user", 1, USERS)}).inputs
    assert item.fields == (IdField(rows=USERS, first=1, offset=-1),)


class Lists(nn.Module):
    """Read lists as numbers, or rows of a table computed from them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.item, self.out = nn.Embedding(ITEMS + 1, 1), nn.Linear(5, 1)

    def forward(self, fixed: Tensor) -> Tensor:
        if self.kind == "numbers":
            return self.out(fixed)
        return self.item(fixed + 1 if self.kind == "shifted" else fixed.clamp(max=3)).sum(dim=1)


def test_lists_of_one_length_may_be_numbers():
    assert derive(Lists("numbers")).inputs == (DenseInput(name="fixed", shape=(5,)),)


@pytest.mark.parametrize("kind", ["shifted", "clamped"])
def test_rows_computed_from_lists_raise(kind):
    with raises_code(InspectionFailed, "list_computed", column="fixed"):
        derive(Lists(kind))


class Weights(nn.Module):
    """Read lists of numbers."""

    def forward(self, seen: Tensor) -> Tensor:
        return seen.float().sum(dim=1)


def test_lists_of_several_lengths_that_no_table_reads_raise():
    with raises_code(InspectionFailed, "list_unused", column="seen", shortest=2, longest=6):
        derive(Weights())


class FloatIds(nn.Module):
    """Look up ids that are stored as floats."""

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Embedding(USERS, 1)

    def forward(self, user: Tensor) -> Tensor:
        return self.user(user[:, 0].long())


def test_floats_that_are_looked_up_raise():
    user = SAMPLE["user"]
    floats = replace(user, kind="float", values=user.values.astype(np.float32))
    with raises_code(InspectionFailed, "float_ids", column="user"):
        derive(FloatIds(), {"user": floats})


class Changing(nn.Module):
    """Change the inputs in place, and return NaN for a price above 0.9."""

    def __init__(self) -> None:
        super().__init__()
        self.joined = nn.Embedding(USERS + ITEMS, 1)

    def forward(self, ids: Tensor, price: Tensor) -> Tensor:
        ids += torch.tensor([0, USERS])
        return self.joined(ids).sum(dim=1) + torch.where(price > 0.9, torch.nan, price)


def test_inputs_that_the_network_changes_are_derived_and_nan_raises():
    small = replace(SAMPLE["price"], values=SAMPLE["price"].values * 0.5)
    (item, _) = derive(Changing(), {**SAMPLE, "price": small}, ids="user,item").inputs
    assert [field.offset for field in item.fields] == [0, USERS]
    with raises_code(InspectionFailed, "outputs_not_finite", rows=ROWS):
        derive(Changing(), ids="user,item")
    missing = replace(small, values=np.where(small.values < 0.1, np.nan, small.values))
    with raises_code(InspectionFailed, "values_not_finite", column="price"):
        derive(Changing(), {**SAMPLE, "price": missing}, ids="user,item")


def test_mapping_keeps_its_other_entries_if_one_is_named():
    derived = derive(Mapping(), user="user", price="age")
    assert [item.columns for item in derived.inputs] == [("user",), ("age",), ("age",)]


class ChangingMapping(nn.Module):
    """Change an entry of a mapping in place."""

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Embedding(USERS + 1, 1)

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        x["user"] += 1
        return self.user(x["user"])


def test_tensors_of_a_mapping_are_those_before_the_network_changed_them():
    derived = derive(ChangingMapping())
    assert derived.tensors["user"].tolist() == SAMPLE["user"].values.tolist()
    assert derived.inputs[0].fields == (IdField(rows=USERS, offset=1),)


class NextItem(nn.Module):
    """Score an item by the last one of a list; places are as many as the longest list has ids.

    ``forward`` returns vectors, as the sequential models of RecBole do.
    """

    def __init__(self) -> None:
        super().__init__()
        self.table, self.place = nn.Embedding(ITEMS, 4), nn.Embedding(6, 4)

    def forward(self, seen: Tensor, count: Tensor) -> Tensor:
        states = self.table(seen) + self.place(torch.arange(seen.shape[1]))
        return states[torch.arange(len(seen)), count - 1]

    def predict(self, inputs: dict[str, Tensor]) -> Tensor:
        vectors = self.forward(inputs["seen"], inputs["count"])
        return (vectors * self.table(inputs["item"])).sum(dim=1)


def test_other_method_receives_a_sequence_and_lengths_computed_from_it():
    lengths = np.array([len(values) for values in SAMPLE["seen"].values])
    count = SampleColumn("count", "integer", lengths, low=2, high=6)
    derived = derive_inputs(NextItem(), {**SAMPLE, "count": count}, {}, (), method="predict")
    assert (derived.call.method, derived.call.form) == ("predict", "mapping")
    sequence = SequenceInput(name="seen", shape=(6,), table="table", min_length=2, lengths="count")
    assert derived.inputs == (IdInput(name="item", table="table"), sequence)
    columns = {"count": ("lengths(seen)",)}
    by_expression = derive_inputs(NextItem(), SAMPLE, columns, (), method="predict")
    assert by_expression.inputs == derived.inputs


def test_integers_that_are_not_always_the_lengths_are_an_input():
    count = SampleColumn("count", "integer", np.full(ROWS, 2), low=2, high=2)
    derived = derive_inputs(NextItem(), {**SAMPLE, "count": count}, {}, (), method="predict")
    assert [(item.name, item.kind) for item in derived.inputs] == [
        ("item", "id"),
        ("seen", "sequence"),
        ("count", "integer"),
    ]


def test_method_that_the_network_does_not_have_raises():
    with raises_code(InspectionFailed, "method_missing", architecture="NextItem", method="score"):
        derive_inputs(NextItem(), SAMPLE, {}, (), method="score")
