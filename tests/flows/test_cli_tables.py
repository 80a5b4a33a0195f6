"""``recpress tables``: output of its commands, and input that it refuses with exit code 2."""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from drafts import ROOT, environment
from safetensors.torch import load_file, save_file

from flows.cli import app

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """A function that runs ``recpress tables`` in this process.

    It returns the exit code, standard output and standard error.
    """

    def run_command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["recpress", "tables", *map(str, arguments)])
        with pytest.raises(SystemExit) as process:
            app.main()
        output = capsys.readouterr()
        return int(process.value.code or 0), output.out, output.err

    return run_command


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A safetensors file with two matrices, of 500 and of 4 rows."""
    torch.manual_seed(0)
    save_file(
        {"user.weight": torch.randn(500, 8), "mlp.weight": torch.randn(4, 8)},
        tmp_path / "model.safetensors",
    )
    return tmp_path / "model.safetensors"


def test_quantize_compresses_a_table_that_check_verifies_and_prints(
    call: Call, source: Path, tmp_path: Path
):
    out = tmp_path / "out"
    code, output, _ = call("quantize", source, out, "--format", "int8", "--tensor", "user")
    assert code == 0
    # "user" has 500 rows of 8 float32 (16,000 bytes), then of 8 int8 codes and a float16 scale.
    assert "user: rowwise_int8, 16,000 -> 5,000 bytes (31.2 %; rowwise_int8 as ordered)" in output
    assert "mlp.weight: float32, 128 -> 128 bytes (100.0 %; not among user)" in output
    tensors = load_file(out / "files" / "model.safetensors")
    assert tensors["user.scale"].dtype == torch.float16
    code, checked, _ = call("check", out)
    assert code == 0
    assert "every hash verified" in checked
    assert checked.splitlines()[:2] == output.splitlines()[:2]


def test_set_accepts_numbers_booleans_and_lists(call: Call, source: Path, tmp_path: Path):
    options = ("--format", "int8", "--set", "rows_per_scale=8", "--set", "symmetric=false")
    code, output, err = call("quantize", source, tmp_path / "out", *options, "--json")
    assert (code, err) == (0, "")
    lines = {line["module"]: line for line in json.loads(output)["plan"]["lines"]}
    # 500 rows of 8 codes, and a float16 scale and offset for each of 63 blocks of 8 rows.
    assert lines["user"]["bytes_after"] == 500 * 8 + 2 * 2 * 63
    options = ("--format", "kmeans", "--set", "bits=2", "--set", 'tables=["user"]')
    code, _, _ = call("quantize", source, tmp_path / "kmeans", *options)
    assert code == 0


def test_every_option_reaches_the_step(call: Call, source: Path, tmp_path: Path):
    options = ("--format", "int4", "--scale", "float32", "--clipping", "mse", "--min-rows", "5")
    code, output, _ = call("quantize", source, tmp_path / "out", *options, "--json")
    assert code == 0
    line = json.loads(output)["plan"]["lines"][0]
    fields = {"rows": 4, "min_rows": 5}  # the plan's first line is that of "mlp.weight"
    assert line["reasons"] == [{"code": "too_few_rows", "fields": fields}]
    assert line["reason"] == "has 4 rows, fewer than min_rows 5"
    _, output, _ = call("check", tmp_path / "out", "--json")
    # The list has the artifact and the description of its tables.
    step = json.loads(output)[1]["step"]
    assert (step["scale"], step["clipping"], step["min_rows"]) == ("float32", "mse", 5)
    # --set can also set a setting that has its own option.
    code, output, _ = call(
        "quantize", source, tmp_path / "set", "--format", "int4", "--set", "clipping=mse"
    )
    assert code == 0


def test_formats_lists_table_formats_and_their_settings(call: Call):
    code, output, _ = call("formats")
    assert code == 0
    assert "int8: Store embedding tables as one byte per weight" in output
    assert "clipping (min_max)" in output
    code, output, _ = call("formats", "--json")
    assert json.loads(output).keys() >= {"int8", "int4"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--format", "int7"], ["no table format 'int7'", "int8"]),
        (["--format", "bfloat16", "--clipping", "mse"], ["no setting 'clipping'"]),
        (["--format", "int8", "--scale", "float8"], ["scale", "'float16' or 'float32'"]),
        (["--format", "int8", "--set", "scale"], ["NAME=VALUE"]),
        (["--format", "int8", "--set", "colour=red"], ["no setting 'colour'"]),
        (["--format", "int8", "--tensor", "itme*"], ["'itme*'", "user.weight", "Correct"]),
    ],
)
def test_invalid_options_exit_with_code_2_and_write_no_file(
    options: list[str], words: list[str], call: Call, source: Path, tmp_path: Path
):
    code, out, err = call("quantize", source, tmp_path / "out", *options)
    assert code == 2
    assert out == ""
    assert err.startswith("recpress: ")
    for word in words:
        assert word in err
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_missing_input_and_folder_with_files_exit_with_code_2(
    call: Call, source: Path, tmp_path: Path
):
    code, _, err = call("quantize", tmp_path / "no", tmp_path / "out", "--format", "int8")
    assert code == 2
    assert "does not exist" in err
    code, _, err = call("quantize", source, tmp_path, "--format", "int8")
    assert code == 2
    assert "is not empty" in err
    code, _, err = call("check", tmp_path)
    assert code == 2
    assert "no manifest.json" in err


def test_tables_quantize_imports_neither_prefect_nor_mlflow(source: Path, tmp_path: Path):
    code = (
        "import sys\n"
        "from flows.cli.app import main\n"
        "try:\n    main()\nexcept SystemExit as ended:\n    assert not ended.code\n"
        "assert not {'prefect', 'mlflow', 's3fs', 'onnx'} & sys.modules.keys()"
    )
    arguments = ["tables", "quantize", str(source), str(tmp_path / "out"), "--format", "int8"]
    process = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    assert (tmp_path / "out" / "manifest.json").exists()


def code_blocks(language: str) -> list[str]:
    """Return the code blocks of a language in docs/tables.md."""
    page = (Path(ROOT) / "docs" / "tables.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def test_documented_commands_print_the_documented_output(
    call: Call,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    (commands,), (python,) = code_blocks("bash"), code_blocks("python")
    (printed,) = code_blocks("text")
    script = re.fullmatch(r"python - <<'END'\n(.*?)END\n(.*)", commands, re.DOTALL)
    assert script is not None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "write_tables.py").write_text(script[1])
    runpy.run_path("write_tables.py")
    output = ""
    for line in script[2].splitlines():
        recpress, tables, *arguments = shlex.split(line, comments=True)
        assert (recpress, tables) == ("recpress", "tables")
        code, out, err = call(*arguments)
        assert code == 0, err
        output += out
    assert output.count(printed) == 2  # printed by quantize and by check
    (tmp_path / "read_tables.py").write_text(python)
    runpy.run_path("read_tables.py")
    assert capsys.readouterr().out == "torch.Size([2, 64])\n"


@pytest.mark.nightly  # the test above runs the same commands in one process
def test_documented_commands_print_the_documented_output_in_a_shell(tmp_path: Path):
    (commands,), (python,) = code_blocks("bash"), code_blocks("python")
    (printed,) = code_blocks("text")
    bash = shutil.which("bash")
    assert bash is not None
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.run(
        [bash, "-euo", "pipefail", "-c", f"{commands}\npython - <<'END'\n{python}\nEND"],
        cwd=tmp_path,
        env={**environment(tmp_path), "PATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.count(printed) == 2  # printed by quantize and by check
    assert process.stdout.endswith("torch.Size([2, 64])\n")
