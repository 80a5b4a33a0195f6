"""The README's commands for a model of one's own, run one after another in this process."""

import shlex
from pathlib import Path

import pytest
from command_line import run_main
from test_readme import commands, write_own_model


def test_the_readmes_commands_for_a_model_of_ones_own_do_what_they_say(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_own_model(fresh)
    monkeypatch.chdir(fresh)
    outputs = {}
    for line in commands("recpress bundle pack ./draft").replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["export"]:
            for setting in words[1:]:
                name, _, value = setting.partition("=")
                if name == "PYTHONPATH":
                    monkeypatch.syspath_prepend(str(fresh / value))
                elif name != "PATH":
                    monkeypatch.setenv(name, value)
        else:
            assert words[0] == "recpress", line
            code, said = run_main(monkeypatch, capsys, *words[1:])
            assert code == 0, said
            outputs[words[1]] = said
    assert list(outputs) == ["bundle", "compress", "registry"]
    assert "onnxruntime: accepted" in outputs["compress"]
    assert (fresh / "serving" / "model.onnx").stat().st_size > 0
