"""Compression of tables from file to file: results, resumed runs, and refused sources."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from error_codes import raises_code
from reason_codes import require_reason
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressors.contracts import Reason
from compressors.core.state.module_state import build_module
from compressors.errors.compression import ModelRefused, NothingToCompress
from compressors.quantize.dense.float16 import Float16
from compressors.quantize.tables.kmeans import KMeans
from compressors.quantize.tables.residual_codes import ResidualCodes
from compressors.quantize.tables.rowwise_int4 import RowwiseInt4
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8
from infra.errors import BundleRefused, CommandRefused
from tasks.bundles.table_files import (
    build_table_step,
    check,
    module_name,
    quantize,
    quantize_artifact,
)
from tasks.orchestration.workspace import store
from tasks.tables import quantize_tables

ROOT = Path(__file__).parents[2]


def create_tensors() -> dict[str, Tensor]:
    """Create two float tables, a dense layer and an integer, the same in every call."""
    torch.manual_seed(0)
    return {
        "user.weight": torch.randn(3000, 16),
        "item.weight": torch.randn(901, 7).half(),
        "tower.weight": torch.randn(8, 16),
        "tower.bias": torch.randn(8),
        "steps": torch.tensor(5),
    }


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A safetensors file with the tensors of ``create_tensors``."""
    save_file(create_tensors(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


STEP = RowwiseInt8(tables=("user", "item*"))


def test_quantize_encodes_matched_tables_copies_others_and_plans_the_bytes(
    source: Path, tmp_path: Path
):
    result = quantize(source, tmp_path / "out", STEP)
    artifact, tables = check(tmp_path / "out")
    stored = load_file(tmp_path / "out" / "files" / "model.safetensors")
    original = create_tensors()
    for name in ("tower.weight", "tower.bias", "steps"):
        assert torch.equal(stored[name], original[name])
    for name, record in tables.modules.items():
        table = build_module(name, record)
        state = {part: stored[f"{name}.{part}"] for part in ("codes", "scale")}
        table.load_state_dict(state, assign=True)
        weight = original[f"{name}.weight"].float()
        error = (table(torch.arange(len(weight))) - weight).abs()
        # Half the scale for rounding a code, and up to 127 (the largest code) times the error of
        # the scale, which is rounded to float16 with a relative error of 2^-11.
        assert bool((error <= state["scale"].float() * (0.5 + 127 * 2**-11)).all())
    assert result.plan == tables.plan
    lines = {line.module: line for line in result.plan.lines}
    assert lines.keys() == {"user", "item", "tower.weight", "tower.bias", "steps"}
    assert sum(line.bytes_after for line in lines.values()) == sum(
        tensor.nbytes for tensor in stored.values()
    )
    assert lines["user"].bytes_after == 3000 * (16 + 2)  # a row has 16 codes and a float16 scale
    require_reason(lines["tower.weight"].reasons, "not_matched", patterns=("user", "item*"))
    require_reason(lines["steps"].reasons, "not_a_table", shape=(), dtype="int64")
    assert artifact.sha256 == result.sha256
    assert artifact.bytes == result.bytes


def test_table_that_would_not_get_smaller_is_copied(tmp_path: Path):
    original = {"one.weight": torch.randn(1, 3), "half.weight": torch.randn(40, 2).half()}
    original["user.weight"] = torch.randn(4000, 16)
    save_file(original, tmp_path / "model.safetensors")
    step = KMeans()
    plan = quantize(tmp_path / "model.safetensors", tmp_path / "out", step).plan
    lines = {line.module: line for line in plan.lines}
    # kmeans stores 4 bits per weight, 2 bytes of scale per row, and a codebook of 64 bytes. So
    # "one" would have 2 + 2 + 64 bytes, and "half" 40 * (1 + 2) + 64.
    require_reason(lines["one.weight"].reasons, "not_smaller", step="kmeans", bytes=68, present=12)
    require_reason(
        lines["half.weight"].reasons, "not_smaller", step="kmeans", bytes=184, present=160
    )
    assert lines["user"].format == "kmeans"
    result = load_file(tmp_path / "out" / "files" / "model.safetensors")
    assert torch.equal(result["one.weight"], original["one.weight"])
    assert torch.equal(result["half.weight"], original["half.weight"])


def test_result_does_not_depend_on_blocks_workers_shards_or_storage(source: Path, tmp_path: Path):
    """The same tensors are read from one file, from two shards, and from an artifact."""
    expected = quantize(source, tmp_path / "whole", STEP)
    for number, (rows, workers) in enumerate([(1, 1), (7, 3), (10**9, 2)]):
        result = quantize(source, tmp_path / f"{number}", STEP, block_rows=rows, workers=workers)
        assert result.sha256 == expected.sha256
    shards, original = tmp_path / "shards", create_tensors()
    shards.mkdir()
    save_file({"user.weight": original.pop("user.weight")}, shards / "a.safetensors")
    save_file(original, shards / "b.safetensors")
    index = {"user.weight": "a.safetensors", **dict.fromkeys(original, "b.safetensors")}
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert quantize(shards, tmp_path / "from-shards", STEP).sha256 == expected.sha256
    artifact = quantize_artifact(store().put(shards), STEP, block_rows=50)
    assert artifact.sha256 == expected.sha256
    assert store().artifact(artifact.uri) == artifact
    assert not any((tmp_path / "recpress" / "progress").glob("*"))


def test_quantize_tables_returns_an_artifact_and_refuses_steps_that_need_a_model(
    source: Path, tmp_path: Path
):
    folder = tmp_path / "folder"
    folder.mkdir()
    source.rename(folder / "model.safetensors")
    stored = store().put(folder)
    result = quantize_tables.fn(stored, STEP)
    assert result == quantize_artifact(stored, STEP)
    with raises_code(CommandRefused, "method_needs_model", method="float16"):
        quantize_tables.fn(stored, Float16())


def test_killed_run_is_resumed_without_encoding_finished_blocks_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    rows, dim, block_rows = 200_000, 32, 2000
    save_file({"t.weight": torch.randn(rows, dim)}, tmp_path / "large.safetensors")
    step = RowwiseInt4(clipping="mse")
    expected = quantize(
        tmp_path / "large.safetensors", tmp_path / "whole", step, block_rows=block_rows
    )
    code = (
        "import sys; from pathlib import Path; from tasks.bundles.table_files import quantize;"
        "from compressors.quantize.tables.rowwise_int4 import RowwiseInt4;"
        "quantize(Path(sys.argv[1]), Path(sys.argv[2]), RowwiseInt4(clipping='mse'),"
        f"block_rows={block_rows})"
    )
    # A run writes one line to its journal for each block that is written to the result's file.
    out, journal = tmp_path / "out", tmp_path / ".out.journal"
    command = [sys.executable, "-c", code, str(tmp_path / "large.safetensors"), str(out)]
    with subprocess.Popen(command, cwd=ROOT, env=dict(os.environ)) as process:
        deadline = time.monotonic() + 120
        # With more than 12 lines, at least ten of the hundred blocks of rows are written.
        while not (journal.exists() and journal.read_bytes().count(b"\n") > 12):
            assert process.poll() is None, "the process ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert not out.exists()
    journal_lines = journal.read_bytes().count(b"\n")
    reported_bytes: list[int] = []
    encoded_rows: list[int] = []
    encode = RowwiseInt4.encode

    def count_and_encode(
        self: RowwiseInt4, block: Tensor, params: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        encoded_rows.append(len(block))
        return encode(self, block, params)

    monkeypatch.setattr(RowwiseInt4, "encode", count_and_encode)
    result = quantize(
        tmp_path / "large.safetensors",
        out,
        step,
        block_rows=block_rows,
        progress=lambda read, total: reported_bytes.append(read),
    )
    assert result.sha256 == expected.sha256
    assert sum(reported_bytes) == rows * dim * 4  # progress includes the blocks written before
    # Three lines of the journal are not for blocks of rows: its first line identifies the run, one
    # is for the header of the safetensors file, and one for tensors that do not have a row for
    # each row of the table, such as a codebook.
    finished_blocks = journal_lines - 3
    assert sum(encoded_rows) == rows - block_rows * finished_blocks
    # No temporary file is left.
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("step", "code", "fields"),
    [
        (
            RowwiseInt8(tables=("usr",)),
            "name_unmatched",
            {"pattern": "usr", "names": ("item.weight", "tower.weight", "user.weight")},
        ),
        (RowwiseInt8(tables=("tower.bias",)), "name_unmatched", {"pattern": "tower.bias"}),
        (RowwiseInt8(min_rows=10**6), "float_table_missing", {}),
    ],
)
def test_step_that_matches_no_table_is_refused_with_the_existing_tables(
    step, code: str, fields: dict[str, Any], source: Path
):
    with raises_code(NothingToCompress, code, **fields) as caught:
        quantize(source, source.parent / "out", step)
    if code == "float_table_missing":
        reason = caught.value.fields["reasons"]["user.weight"]
        assert reason == Reason("too_few_rows", rows=3000, min_rows=10**6)
    assert sorted(path.name for path in source.parent.iterdir()) == ["model.safetensors"]


def test_file_without_tables_is_refused(tmp_path: Path):
    save_file({"bias": torch.zeros(3), "ids": torch.zeros(2, 2).long()}, tmp_path / "in")
    with raises_code(NothingToCompress, "float_table_missing"):
        quantize(tmp_path / "in", tmp_path / "out", RowwiseInt8())


def test_missing_or_invalid_safetensors_file_is_refused(tmp_path: Path):
    with raises_code(CommandRefused, "tables_missing", path=str(tmp_path / "in")):
        quantize(tmp_path / "in", tmp_path / "out", RowwiseInt8())
    (tmp_path / "in").write_bytes(b"not safetensors")
    with raises_code(BundleRefused, "not_safetensors", file=str(tmp_path / "in")):
        quantize(tmp_path / "in", tmp_path / "out", RowwiseInt8())


def test_weight_that_is_not_finite_is_refused_without_a_result(tmp_path: Path):
    weight = torch.zeros(30, 4)
    weight[17, 0] = float("nan")
    save_file({"t.weight": weight}, tmp_path / "in")
    with raises_code(ModelRefused, "row_not_finite", row=17, table="t.weight"):
        quantize(tmp_path / "in", tmp_path / "out", RowwiseInt8())
    assert not (tmp_path / "out").exists()


def test_changed_source_is_not_resumed_from_the_journal(source: Path, tmp_path: Path):
    original = create_tensors()
    original["user.weight"][2999, 3] = float("inf")
    original["user.weight"][0] += 1  # in the first block, which is written before the error
    save_file(original, source)
    with pytest.raises(ModelRefused):
        quantize(source, tmp_path / "out", STEP, block_rows=100, workers=1)
    assert (tmp_path / ".out.journal").exists()
    save_file(create_tensors(), source)
    result = quantize(source, tmp_path / "out", STEP, block_rows=100)
    assert result.sha256 == quantize(source, tmp_path / "fresh", STEP).sha256


@pytest.mark.parametrize(
    ("tensor", "module"), [("user.weight", "user"), ("user", "user"), ("weight", "")]
)
def test_module_name_is_the_tensor_name_without_weight(tensor: str, module: str):
    assert module_name(tensor) == module


def test_tensor_named_weight_is_a_table_with_an_empty_module_name(tmp_path: Path):
    save_file({"weight": torch.randn(20, 4)}, tmp_path / "in")
    quantize(tmp_path / "in", tmp_path / "out", RowwiseInt8())
    assert load_file(tmp_path / "out" / "files" / "model.safetensors").keys() == {"codes", "scale"}


def test_build_table_step_accepts_kind_or_short_name_and_refuses_unknown_settings():
    assert build_table_step("int8", {}) == build_table_step("rowwise_int8", {}) == RowwiseInt8()
    settings = {"clipping": "mse", "min_rows": "7", "tables": ["a"]}
    assert build_table_step("int4", settings) == RowwiseInt4(
        clipping="mse", min_rows=7, tables=("a",)
    )
    with raises_code(CommandRefused, "table_format_unknown", format="float16") as caught:
        build_table_step("float16", {})
    assert caught.value.fields["formats"][:2] == ("int8", "int4")
    with raises_code(CommandRefused, "setting_unknown", setting="colour") as caught:
        build_table_step("int8", {"colour": "red"})
    assert {"clipping", "min_rows"} <= set(caught.value.fields["settings"])


@pytest.mark.parametrize("step", [KMeans(), ResidualCodes()], ids=lambda step: step.kind)
def test_fitted_table_with_nan_is_refused_with_the_row(step, tmp_path):
    weight = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    weight[123, 4] = float("nan")
    save_file({"user": weight}, tmp_path / "in.safetensors")
    with raises_code(ModelRefused, "row_not_finite", row=123, table="user"):
        quantize(tmp_path / "in.safetensors", tmp_path / "out", step)
