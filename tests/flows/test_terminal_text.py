"""Names from outside reach a terminal as text: in full, without markup or control sequences."""

import ast
import functools
import io
import json
import logging
import re
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from command_line import run_main
from drafts import ROOT
from named_network import Named
from rich.status import Status
from rich.table import Table
from safetensors.torch import save_file

from flows.cli.console import _Stages, console, write_table
from infra.pages.html import render
from infra.printable import one_line, printable
from tasks.orchestration import log_lines
from tasks.report.cells import cell

HOSTILE = {
    "brackets": "price[usd]",
    "closing tag": "x[/red]",
    "style": "[bold red]x",
    "link": "[link=file:///etc]x[/link]",
    "escape": "\x1b[31mred\x1b]0;title\x07",
    "C1": "\x9b31mred\x9d0;title\x9c",
    "line": "a\nrecpress: accepted",
    "return": "a\rb",
    "bidi": "a\u202eb\u2066c",
    "zero width": "a\u200bb\ufeffc",
    "separators": "a\u2028b\u2029c",
    "tags": "a\U000e0041b",
    "emoji code": ":boom:",
    "html": "<script>alert(1)</script>",
    "table": "a|b`c",
}
NO_NAMES = {"line", "return"}
"""No module may have these in its name: torch would write them into code."""
ONE_AND_ALL = [
    pytest.param("".join(HOSTILE.values()).replace(".", ""), id="everything"),
    *(pytest.param(name, id=kind, marks=pytest.mark.slow) for kind, name in HOSTILE.items()),
]
NAMES = {kind: name for kind, name in HOSTILE.items() if kind not in NO_NAMES}
EVERY_NAME = "".join(NAMES.values()).replace(".", "")
ONE_AND_ALL_NAMES = [
    pytest.param(EVERY_NAME, id="everything"),
    *(pytest.param(name, id=kind, marks=pytest.mark.slow) for kind, name in NAMES.items()),
]
RAW = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\U000e0000-\U000e007f]"
)


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Run ``main`` in this process; returns exit code, and both outputs as one text."""
    monkeypatch.setenv("RECPRESS_HOME", str(tmp_path / "recpress"))
    monkeypatch.setenv("RECPRESS_ALLOWED_MODULES", "named_network")

    return functools.partial(run_main, monkeypatch, capsys)


def write_draft(folder: Path, name: str) -> None:
    folder.mkdir()
    torch.manual_seed(0)
    save_file(Named(names=[name, "other"]).state_dict(), folder / "model.safetensors")
    draw = np.random.default_rng(0)
    for split in ("train", "test"):
        columns = {column: draw.integers(0, 50, 300) for column in ("a", "b")}
        columns |= {f"d{at}": draw.normal(size=300).astype("f4") for at in range(2)}
        columns["y"] = draw.integers(0, 2, 300)
        pq.write_table(pa.table(columns), folder / f"{split}.parquet")
    signature = {
        "inputs": [
            {"kind": "id", "name": "a", "table": f"tables.{name}"},
            {"kind": "id", "name": "b", "table": "tables.other"},
            {"kind": "dense", "name": "dense", "columns": ["d0", "d1"], "shape": [2]},
        ],
        "outputs": [{"name": "y", "kind": "ctr", "form": "logit", "label": "y", "metric": "auc"}],
    }
    architecture = {"path": "named_network:Named", "config": {"names": [name, "other"]}}
    document = {
        "schema_version": 2,
        "name": "named",
        "version": "1",
        "signature": signature,
        "network": {"architecture": architecture},
        "data": {split: f"{split}.parquet" for split in ("train", "test")},
    }
    (folder / "model.json").write_text(json.dumps(document))


@pytest.mark.parametrize("name", ONE_AND_ALL_NAMES)
def test_every_bundle_command_shows_a_hostile_name_in_full_as_text(call, tmp_path, name):
    write_draft(tmp_path / "draft", name)
    limit = ("--limit", "auc vs baseline >= -0.4")
    commands = {
        ("bundle", "pack", str(tmp_path / "draft")): True,
        ("bundle", "show", "named"): True,
        ("bundle", "check", "named"): False,  # it names no module
        ("explain", "named", "--preset", "safe", *limit): True,
        ("explain", "named", "--preset", "fast", *limit): True,
    }
    for command, shows_name in commands.items():
        code, text = call(*command)
        assert code == 0, text
        assert not RAW.search(text), repr(text)
        assert not shows_name or one_line(name) in text, text
    for command in (("bundle", "show", "named", "--json"), ("explain", "named", *limit, "--json")):
        code, text = call(*command)
        assert code == 0
        assert not RAW.search(text)
        assert any(name in value for value in texts_in(json.loads(text)))


@pytest.mark.parametrize("kind", sorted(NO_NAMES))
def test_a_name_with_a_line_end_is_refused_and_shown_as_text(call, tmp_path, kind):
    write_draft(tmp_path / "draft", HOSTILE[kind])
    code, text = call("bundle", "pack", str(tmp_path / "draft"))
    assert code == 2, text
    assert "attribute names without quotes" in text
    assert not RAW.search(text), repr(text)


@pytest.mark.slow
def test_an_order_shows_hostile_names_as_text_everywhere(call, tmp_path, monkeypatch):
    """Stages, the report in its three forms, the registry and Triton's configuration."""
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    monkeypatch.setenv("RECPRESS_TRITON", str(tmp_path / "triton"))
    write_draft(tmp_path / "draft", EVERY_NAME)
    into, page = tmp_path / "into", tmp_path / "page.html"
    limit = ("--limit", "auc vs baseline >= -0.4")
    commands = (
        ("bundle", "pack", str(tmp_path / "draft")),
        ("compress", "named", "--preset", "fast", *limit, "--promote"),
        ("registry", "list"),
        ("registry", "show", "named", "--version", "1"),
        ("registry", "show", "named", "--version", "1", "--html", str(page)),
        ("registry", "fetch", "named", "--version", "1", "--into", str(into)),
        ("triton", "show", "named"),
    )
    printed = ""
    for command in commands:
        code, text = call(*command)
        assert code == 0, text
        assert not RAW.search(text), (command, text)
        printed += text
    assert one_line(EVERY_NAME) in printed
    assert "<script>" not in page.read_text()
    stored = [*(tmp_path / "recpress" / "store").rglob("report.*")]
    shown = [path for path in stored if path.suffix in {".html", ".md"}]
    assert {path.suffix for path in shown} == {".html", ".md"}
    for path in (page, *shown):
        assert not RAW.search(path.read_text()), path


def texts_in(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for pair in value.items() for part in pair for text in texts_in(part)]
    return [text for item in value for text in texts_in(item)] if isinstance(value, list) else []


@pytest.mark.parametrize("name", ONE_AND_ALL)
def test_arguments_and_files_with_hostile_names_are_refused_as_text(call, tmp_path, name):
    commands = (
        (name,),
        ("bundle", name),
        ("bundle", "pack", name),
        ("bundle", "show", name),
        ("explain", name, "--limit", "auc vs baseline >= -0.4"),
        ("explain", "x", "--limit", name),
        ("explain", "x", "--preset", name, "--limit", "auc vs baseline >= -0.4"),
        ("explain", "x", f"--{name}"),
        ("compress", "x", "--seed", name),
        ("compress", "--order", name),
        ("compress", "x", "--target", name, "--limit", "auc vs baseline >= -0.4"),
        ("tables", "check", name),
        ("registry", "show", name),
        ("registry", "promote", name),
        ("registry", "rollback", name),
        ("registry", "fetch", name, "--into", str(tmp_path / "into"), "--target", name),
    )
    for command in commands:
        code, text = call(*command)
        assert code in (1, 2), (command, text)
        assert "Traceback" not in text
        assert not RAW.search(text), (command, text)


@pytest.mark.parametrize("kind", HOSTILE)
def test_variables_of_the_environment_with_hostile_values_are_shown_as_text(
    call, kind, monkeypatch
):
    for variable in ("RECPRESS_STORE", "RECPRESS_DEVICE", "RECPRESS_TRITON"):
        with monkeypatch.context() as patch:
            patch.setenv(variable, HOSTILE[kind])
            code, text = call("bundle", "show", "x")
        assert code in (1, 2), text
        assert not RAW.search(text), (variable, text)


def on_terminal(monkeypatch) -> io.StringIO:
    """What a terminal of 200 columns receives, with rich's own styles switched off."""
    out = io.StringIO()
    out.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", out)
    return out


def without_styles(text: str) -> str:
    """The text without the sequences of bold, cursor and line that rich itself writes."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-ln-z]|\x1b\[(?:[0-9];?)*m|\r", "", text)


@pytest.mark.parametrize("kind", sorted(HOSTILE.keys() - {"escape", "return", "line"}))
def test_lines_tables_titles_and_stages_on_a_terminal_show_names_as_text(kind, monkeypatch):
    name, out = HOSTILE[kind], on_terminal(monkeypatch)
    table = Table(title=f"title {name}")
    table.add_column(f"column {name}")
    table.add_row(f"cell {name}")
    terminal = console()
    terminal.print(f"line {name}")
    terminal.print(table)
    write_table(["x"], [[f"written {name}"]])
    with Status("begin", console=terminal) as status:
        _Stages(terminal, status).emit(
            logging.makeLogRecord({"msg": f"stage {name}", "levelno": logging.INFO})
        )
    text = without_styles(out.getvalue())
    for place in ("title", "column", "cell", "line", "written", "stage"):
        assert f"{place} {printable(name)}" in text, (place, text)
    assert not RAW.search(text.replace("\x1b", "")), repr(text)


@pytest.mark.parametrize("kind", ["escape", "return"])
def test_a_terminal_never_receives_the_sequence_of_a_name(kind, monkeypatch):
    name, out = HOSTILE[kind], on_terminal(monkeypatch)
    terminal = console()
    terminal.print(name)
    write_table([name], [[name]])
    assert "\x1b[31m" not in out.getvalue()
    assert "\x07" not in out.getvalue()
    assert "a\rb" not in out.getvalue()
    assert printable(name) in without_styles(out.getvalue())


def test_a_console_refuses_markup():
    with pytest.raises(ValueError, match="without markup"):
        console().print("[red]x[/red]", markup=True)


OURS = ("flows", "tasks", "infra")


def test_no_module_reads_markup_or_makes_a_console_of_its_own():
    for path in (path for top in OURS for path in (ROOT / top).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "markup":
                assert ast.literal_eval(node.value) is False, path
            if isinstance(node, ast.Attribute):
                assert node.attr not in ("from_markup", "from_ansi"), path
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rich"):
                names = {name.name for name in node.names}
                assert node.module != "rich.markup", path
                assert path.name == "console.py" or "Console" not in names, path


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_log_line_is_one_line_without_control_characters(kind, caplog):
    create = logging.getLogRecordFactory()
    try:
        log_lines.install()
        with caplog.at_level(logging.INFO):
            logging.getLogger("tasks.orchestration.progress").info("stage %s", HOSTILE[kind])
            logging.getLogger("prefect.flow_runs").info("run %s", HOSTILE[kind])
    finally:
        logging.setLogRecordFactory(create)
    ours, theirs = (record.getMessage() for record in caplog.records)
    assert ours == f"stage {one_line(HOSTILE[kind])}"
    assert "\n" not in ours
    assert not RAW.search(theirs)


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_cell_of_a_report_is_neither_html_nor_markup(kind):
    text = cell(f"![x](http://a/{HOSTILE[kind]})")
    assert "\n" not in text
    assert not RAW.search(text)
    assert "](" not in text
    assert "<" not in text
    assert "`" not in text
    assert "|" not in text.replace("\\|", "")


def test_a_page_contains_no_control_character():
    page = render("infra/pages/templates/document.html.jinja", title="x\x1b[31m\u202e\x9b")
    assert "<title>x\\u001b[31m\\u202e\\u009b</title>" in page
    assert not RAW.search(page)


@pytest.mark.parametrize("text", ["\ud800", "a\udc80b", "\x1b", "\U000e0041", "\u2028", "\x7f"])
def test_json_stays_the_same_json(text):
    if "\ud800" <= text[0] <= "\udfff":
        assert json.loads(printable(f'"{text}"')) == text
    escaped = printable(json.dumps(text, ensure_ascii=False))
    assert json.loads(escaped) == text
    escaped.encode()


def test_ordinary_text_of_any_language_is_left_as_it_is():
    text = "Größe 例え עברית हिन्दी 🙂 café\tx\ny"
    assert printable(text) == text
