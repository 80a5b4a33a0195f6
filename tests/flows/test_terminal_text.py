"""Untrusted names and values are printed completely, but cannot control a terminal, log or page.

``printable`` escapes control, invisible and direction characters, but not tabs and line ends;
``one_line`` escapes those, too. A draft is the folder of a bundle before it is packed.
"""

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

from flows.cli.console import _ProgressHandler, console, write_table
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
"""Texts that could control a terminal, a log or a page, by kind.

Joined texts are used without ".", which separates the parts of a module's name.
"""

NOT_MODULE_NAMES = {"line", "return"}
"""Kinds that pack refuses in the name of a module, because torch writes such names into code."""

JOINED_AND_EACH_TEXT = [
    pytest.param("".join(HOSTILE.values()).replace(".", ""), id="everything"),
    *(pytest.param(name, id=kind, marks=pytest.mark.slow) for kind, name in HOSTILE.items()),
]
"""All texts joined, in the default tests, and each text alone, with the marker ``slow``."""

MODULE_NAMES = {kind: name for kind, name in HOSTILE.items() if kind not in NOT_MODULE_NAMES}
JOINED_NAME = "".join(MODULE_NAMES.values()).replace(".", "")
JOINED_AND_EACH_NAME = [
    pytest.param(JOINED_NAME, id="everything"),
    *(pytest.param(name, id=kind, marks=pytest.mark.slow) for kind, name in MODULE_NAMES.items()),
]
CONTROL_CHARACTER = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\U000e0000-\U000e007f]"
)
"""A control, invisible or direction character; tabs and line ends are allowed."""


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """A function that runs ``main`` in this process; it returns the exit code and all output."""
    monkeypatch.setenv("RECPRESS_HOME", str(tmp_path / "recpress"))
    monkeypatch.setenv("RECPRESS_ALLOWED_MODULES", "named_network")

    return functools.partial(run_main, monkeypatch, capsys)


def write_draft(folder: Path, name: str) -> None:
    """Write a draft of the model ``named`` with two tables, of which one is called ``name``."""
    folder.mkdir()
    torch.manual_seed(0)
    save_file(Named(names=[name, "other"]).state_dict(), folder / "model.safetensors")
    draw = np.random.default_rng(0)
    for split in ("train", "test"):
        columns = {column: draw.integers(0, 50, 300) for column in ("a", "b")}
        columns |= {f"d{index}": draw.normal(size=300).astype("f4") for index in range(2)}
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


@pytest.mark.parametrize("name", JOINED_AND_EACH_NAME)
def test_bundle_commands_and_explain_print_a_hostile_module_name_complete_and_escaped(
    call, tmp_path, name
):
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
        assert not CONTROL_CHARACTER.search(text), repr(text)
        assert not shows_name or one_line(name) in text, text
    for command in (("bundle", "show", "named", "--json"), ("explain", "named", *limit, "--json")):
        code, text = call(*command)
        assert code == 0
        assert not CONTROL_CHARACTER.search(text)
        assert any(name in value for value in texts_in(json.loads(text)))


@pytest.mark.parametrize("kind", sorted(NOT_MODULE_NAMES))
def test_pack_refuses_a_module_name_with_a_line_end_and_prints_no_control_character(
    call, tmp_path, kind
):
    write_draft(tmp_path / "draft", HOSTILE[kind])
    code, text = call("bundle", "pack", str(tmp_path / "draft"))
    assert code == 2, text
    assert "attribute names without quotes" in text
    assert not CONTROL_CHARACTER.search(text), repr(text)


@pytest.mark.slow
def test_compress_registry_and_triton_output_has_no_control_character_of_a_hostile_name(
    call, tmp_path, monkeypatch
):
    """Also checks the page of ``--html`` and the stored reports, but no file of Triton."""
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    monkeypatch.setenv("RECPRESS_TRITON", str(tmp_path / "triton"))
    write_draft(tmp_path / "draft", JOINED_NAME)
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
        assert not CONTROL_CHARACTER.search(text), (command, text)
        printed += text
    assert one_line(JOINED_NAME) in printed
    assert "<script>" not in page.read_text()
    stored = [*(tmp_path / "recpress" / "store").rglob("report.*")]
    reports = [path for path in stored if path.suffix in {".html", ".md"}]
    assert {path.suffix for path in reports} == {".html", ".md"}
    for path in (page, *reports):
        assert not CONTROL_CHARACTER.search(path.read_text()), path


def texts_in(value: object) -> list[str]:
    """Return all strings in a JSON value, keys included."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for pair in value.items() for part in pair for text in texts_in(part)]
    return [text for item in value for text in texts_in(item)] if isinstance(value, list) else []


@pytest.mark.parametrize("name", JOINED_AND_EACH_TEXT)
def test_commands_with_a_hostile_argument_fail_and_print_no_control_character(call, tmp_path, name):
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
        assert not CONTROL_CHARACTER.search(text), (command, text)


@pytest.mark.parametrize("kind", HOSTILE)
def test_commands_with_a_hostile_environment_variable_fail_and_print_no_control_character(
    call, kind, monkeypatch
):
    for variable in ("RECPRESS_STORE", "RECPRESS_DEVICE", "RECPRESS_TRITON"):
        with monkeypatch.context() as patch:
            patch.setenv(variable, HOSTILE[kind])
            code, text = call("bundle", "show", "x")
        assert code in (1, 2), text
        assert not CONTROL_CHARACTER.search(text), (variable, text)


def replace_outputs_by_terminal(monkeypatch) -> io.StringIO:
    """Replace standard output and error by one terminal of 200 columns without colors."""
    out = io.StringIO()
    out.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", out)
    return out


def strip_styles(text: str) -> str:
    """Remove the control sequences for styles and the cursor that rich writes."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-ln-z]|\x1b\[(?:[0-9];?)*m|\r", "", text)


# Not "escape" and "return", which ``strip_styles`` would remove from the output (the next test has
# them), and not "line", which the output has on two lines.
@pytest.mark.parametrize("kind", sorted(HOSTILE.keys() - {"escape", "return", "line"}))
def test_console_lines_tables_and_stages_print_hostile_text_escaped_on_a_terminal(
    kind, monkeypatch
):
    name, out = HOSTILE[kind], replace_outputs_by_terminal(monkeypatch)
    table = Table(title=f"title {name}")
    table.add_column(f"column {name}")
    table.add_row(f"cell {name}")
    terminal = console()
    terminal.print(f"line {name}")
    terminal.print(table)
    write_table(["x"], [[f"written {name}"]])
    with Status("begin", console=terminal) as status:
        _ProgressHandler(terminal, status).emit(
            logging.makeLogRecord({"msg": f"stage {name}", "levelno": logging.INFO})
        )
    text = strip_styles(out.getvalue())
    for place in ("title", "column", "cell", "line", "written", "stage"):
        assert f"{place} {printable(name)}" in text, (place, text)
    assert not CONTROL_CHARACTER.search(text.replace("\x1b", "")), repr(text)


@pytest.mark.parametrize("kind", ["escape", "return"])
def test_console_sends_no_escape_bell_or_carriage_return_of_a_text_to_the_terminal(
    kind, monkeypatch
):
    name, out = HOSTILE[kind], replace_outputs_by_terminal(monkeypatch)
    terminal = console()
    terminal.print(name)
    write_table([name], [[name]])
    assert "\x1b[31m" not in out.getvalue()
    assert "\x07" not in out.getvalue()
    assert "a\rb" not in out.getvalue()
    assert printable(name) in strip_styles(out.getvalue())


def test_console_print_with_markup_raises_value_error():
    with pytest.raises(ValueError, match="without markup"):
        console().print("[red]x[/red]", markup=True)


PRINTING_PACKAGES = ("flows", "tasks", "infra")


def test_no_source_parses_markup_and_only_console_py_imports_rich_console():
    for path in (path for top in PRINTING_PACKAGES for path in (ROOT / top).rglob("*.py")):
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
def test_log_records_escape_control_characters_and_records_of_recpress_are_one_line(kind, caplog):
    create = logging.getLogRecordFactory()
    try:
        log_lines.install()
        with caplog.at_level(logging.INFO):
            logging.getLogger("tasks.orchestration.progress").info("stage %s", HOSTILE[kind])
            logging.getLogger("prefect.flow_runs").info("run %s", HOSTILE[kind])
    finally:
        logging.setLogRecordFactory(create)
    recpress, prefect = (record.getMessage() for record in caplog.records)
    assert recpress == f"stage {one_line(HOSTILE[kind])}"
    assert "\n" not in recpress
    assert prefect == f"run {printable(HOSTILE[kind])}"
    assert not CONTROL_CHARACTER.search(prefect)


@pytest.mark.parametrize("kind", HOSTILE)
def test_report_cell_has_no_html_link_code_or_unescaped_column_separator(kind):
    text = cell(f"![x](http://a/{HOSTILE[kind]})")
    assert "\n" not in text
    assert not CONTROL_CHARACTER.search(text)
    assert "](" not in text
    assert "<" not in text
    assert "`" not in text
    assert "|" not in text.replace("\\|", "")


def test_rendered_page_escapes_the_control_characters_of_its_title():
    page = render("infra/pages/templates/document.html.jinja", title="x\x1b[31m\u202e\x9b")
    assert "<title>x\\u001b[31m\\u202e\\u009b</title>" in page
    assert not CONTROL_CHARACTER.search(page)


@pytest.mark.parametrize("text", ["\ud800", "a\udc80b", "\x1b", "\U000e0041", "\u2028", "\x7f"])
def test_printable_json_text_has_the_same_value(text):
    if "\ud800" <= text[0] <= "\udfff":  # a surrogate, which UTF-8 cannot encode
        assert json.loads(printable(f'"{text}"')) == text
    escaped = printable(json.dumps(text, ensure_ascii=False))
    assert json.loads(escaped) == text
    escaped.encode()


def test_printable_does_not_change_ordinary_text_in_several_languages():
    text = "Größe 例え עברית हिन्दी 🙂 café\tx\ny"
    assert printable(text) == text
