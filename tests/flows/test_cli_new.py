"""``recpress new``: its output, its prompt, and input that it refuses with exit code 2.

A draft is the folder of a bundle before it is packed.
"""

import io
import json
import shlex
import sys
from pathlib import Path

import pytest
from command_line import run_main, run_main_apart
from shop_data import write_shop_data

MODELS = "new_draft_models"


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The arguments of a command that writes a draft of ``ShopNet``, without ``--label``.

    ``ShopNet`` (``tests/new_draft_models.py``) has 40 users, 30 items and 20 tags.
    """
    monkeypatch.setenv("RECPRESS_ALLOWED_MODULES", MODELS)
    monkeypatch.setenv("RECPRESS_HOME", str(tmp_path / "home"))
    monkeypatch.delitem(sys.modules, MODELS, raising=False)
    data = write_shop_data(tmp_path / "data")
    return ["new", str(tmp_path / "new"), "--model", f"{MODELS}:shop", "--data", str(data)]


def test_new_prints_the_signature_and_the_next_commands(arguments, monkeypatch, capsys):
    code, out = run_main(monkeypatch, capsys, *arguments, "--label", "click", "--name", "shop")
    assert code == 0, out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines()]
    # The first line of each table row; reasons continue on further lines, without a first cell.
    first_lines = [row for row in rows if row and row[0]]
    assert [row[:3] for row in first_lines[:5]] == [
        ["user", "id", "user"],
        ["item", "id", "item"],
        ["tags", "padded_bag", "tags"],
        ["price", "dense", "price"],
        ["age", "dense", "age"],
    ]
    assert first_lines[-1] == ["click", "ctr", "probability", "click", "auc"]
    assert "Tables (rows): tables.item (30), tables.user (40), tags (20)" in out


def test_next_command_of_new_packs_the_draft(arguments, monkeypatch, capsys):
    _, out = run_main(monkeypatch, capsys, *arguments, "--label", "click", "--name", "shop")
    program, *command = shlex.split(out.partition("Next:")[2].strip().splitlines()[0])
    assert program == "recpress"
    code, packed = run_main(monkeypatch, capsys, *command)
    assert code == 0, packed
    assert packed.startswith("shop@1")


def test_new_with_json_prints_only_the_model_json(arguments, monkeypatch, capsys):
    code, out, _ = run_main_apart(
        monkeypatch, capsys, *arguments, "--label", "click", "--json", "--group", "user"
    )
    assert code == 0
    assert json.loads(out)["signature"]["group"] == "user"


class Terminal(io.StringIO):
    """Standard input of a person who types."""

    def isatty(self) -> bool:
        return True


def test_new_prompts_for_the_label_in_a_terminal(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", Terminal("\n"))  # Enter selects the default
    code, out = run_main(monkeypatch, capsys, *arguments)
    assert code == 0, out
    assert "Columns of numbers: click, user, item, price, age" in out


def test_new_without_a_label_and_a_terminal_exits_with_code_2(arguments, monkeypatch, capsys):
    code, out = run_main(monkeypatch, capsys, *arguments)
    assert code == 2
    assert "--label" in out


@pytest.mark.parametrize(
    "options",
    [
        ["--label", "click", "--label", "click"],
        ["--label", "=click"],  # the form is OUTPUT=COLUMN
        ["--label", "click", "--input", "user"],
        ["--label", "click", "--metric", "accuracy"],
        ["--label", "click", "--name", "Two Words"],
        ["--label", "click", "--metric", "gauc"],
        ["--label", "click", "--item", "item"],  # the id column of a retrieval model's items
        ["--label", "click", "--from", "recbole"],
        ["--label", "click", "--from", "keras"],
        ["--from", "sentence-transformers"],  # then --model is a folder
    ],
    ids=[
        "label twice",
        "no output",
        "no column",
        "metric",
        "name",
        "metric without a group",
        "item without towers",
        "class of no library",
        "unknown library",
        "no folder of an encoder",
    ],
)
def test_new_with_unusable_options_exits_with_code_2_and_writes_nothing(
    arguments, options, monkeypatch, capsys
):
    code, out = run_main(monkeypatch, capsys, *arguments, *options)
    assert (code, "Traceback" in out) == (2, False), out
    assert not Path(arguments[1]).exists()


def test_from_sentence_transformers_is_the_option_for_encoders(tmp_path, monkeypatch, capsys):
    """Both commands fail with the same message: an encoder has towers, and the data no items."""
    monkeypatch.setenv("RECPRESS_HOME", str(tmp_path / "home"))
    data, folder = write_shop_data(tmp_path / "data"), tmp_path / "encoder"
    folder.mkdir()
    command = ["new", str(tmp_path / "new"), "--data", str(data)]
    results = [
        run_main(monkeypatch, capsys, *command, *options)
        for options in (
            ["--sentence-transformer", str(folder)],
            ["--from", "sentence-transformers", "--model", str(folder)],
        )
    ]
    assert results[0] == results[1]
    assert results[0][0] == 2
    assert "because the model has towers" in results[0][1]


def test_from_sentence_transformers_without_a_folder_exits_with_code_2(
    tmp_path, monkeypatch, capsys
):
    options = ["--from", "sentence-transformers", "--data", str(tmp_path)]
    code, out = run_main(monkeypatch, capsys, "new", str(tmp_path / "new"), *options)
    assert (code, "--model" in out) == (2, True), out
