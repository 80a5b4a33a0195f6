"""Usage reports of libraries: the variables that disable them are set before the imports."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from drafts import ROOT

from infra.telemetry import TELEMETRY_OFF


def output_of(code: str, home: Path) -> str:
    """Run code in a process without the variables, and return what it prints."""
    env = {name: value for name, value in os.environ.items() if name not in TELEMETRY_OFF}
    env |= {"HOME": str(home), "PREFECT_HOME": str(home / "prefect"), "XDG_CACHE_HOME": ""}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    ).stdout


def identifier_files(home: Path) -> list[str]:
    """Return the names of files in which ONNX Runtime stores a machine identifier and events."""
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
def test_import_of_a_module_sets_all_variables_before_it_imports_the_libraries(
    module: str, tmp_path: Path
) -> None:
    # The import hook checks one variable, because all are set by the same call.
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
    assert output_of(code, tmp_path).strip() == repr(TELEMETRY_OFF)


def test_onnx_runtime_stores_no_identifier_of_the_machine(tmp_path: Path) -> None:
    home_without, home_with = tmp_path / "without", tmp_path / "with"
    output_of("import onnxruntime", home_without)
    if not identifier_files(home_without):
        pytest.skip("this build of ONNX Runtime has no telemetry")
    output_of("import infra.onnxruntime.sessions, onnxruntime", home_with)
    assert identifier_files(home_with) == []
