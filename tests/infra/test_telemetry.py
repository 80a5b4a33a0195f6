"""No library reports its use: the variables are set before any of them is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from drafts import ROOT

from infra.telemetry import TELEMETRY_OFF


def printed_by(code: str, home: Path) -> str:
    """What a new process prints that has none of the variables."""
    env = {name: value for name, value in os.environ.items() if name not in TELEMETRY_OFF}
    env |= {"HOME": str(home), "PREFECT_HOME": str(home / "prefect"), "XDG_CACHE_HOME": ""}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    ).stdout


def identifiers(home: Path) -> list[str]:
    """The files in which ONNX Runtime keeps an identifier of this machine and unsent events."""
    return sorted(path.name for path in home.rglob("*") if ".onnxruntime" in path.parts)


@pytest.mark.parametrize(
    "module",
    [
        "infra.registry.mlflow_registry",
        "infra.services.setup",
        "flows.cli.app",
        pytest.param("flows.compress", marks=pytest.mark.nightly),  # imports for seconds
    ],
)
def test_every_variable_is_set_when_a_module_is_imported(module: str, tmp_path: Path) -> None:
    libraries = "'prefect', 'mlflow', 'great_expectations', 'onnxruntime'"
    code = f"""
import sys, importlib.abc

class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        import os
        if name in ({libraries}):
            assert 'ORT_DISABLE_TELEMETRY' in os.environ, name + ' is imported too early'

sys.meta_path.insert(0, Watch())
import {module}, os
print({{name: os.environ.get(name) for name in {list(TELEMETRY_OFF)!r}}})
"""
    assert printed_by(code, tmp_path).strip() == repr(TELEMETRY_OFF)


def test_onnx_runtime_leaves_no_identifier_of_the_machine(tmp_path: Path) -> None:
    without, with_infra = tmp_path / "without", tmp_path / "with"
    printed_by("import onnxruntime", without)
    if not identifiers(without):
        pytest.skip("this build of ONNX Runtime has no telemetry")
    printed_by("import infra.onnxruntime.sessions, onnxruntime", with_infra)
    assert identifiers(with_infra) == []
