"""Open stored homes for the tests: unpacked once, with their expected results."""

import functools
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from compressors.contracts import Artifact
from compressors.lower.parity import check_parity
from infra.bundle.bundle_folder import read
from tasks.orchestration.workspace import local, store
from tests.stored_home.archive import fixtures, unpack
from tests.stored_home.scores import environment

INPUT_QUANTIZING_FORMATS = {"static_int8", "weight_int8", "weight_int4", "float8_dense"}
"""Formats whose layers quantize inputs; a value midway between levels may round either way."""
ROUNDING = 1e-5
"""Tolerance for another order of float sums, relative to the scores' standard deviation.

It is slightly below the worst case of about 1.2e-5: four layers of at most 51 products, each
rounded to 2 ** -24, give 4 * 51 * 6e-8, for sums as large as the standard deviation. The largest
measured difference of 93 bundles is 5e-7 with torch's kernels for SSE and 9e-7 with MKL's common
path.
"""
_SCRATCH = tempfile.TemporaryDirectory(prefix="stored-home-")


@dataclass(frozen=True)
class Fixture:
    """An unpacked stored home and its expected results.

    Attributes:
        folder: folder of the stored fixture.
        expected: content of ``expected.json``.
        tensors: content of ``expected.safetensors``.
        root: folder of the unpacked home.
    """

    folder: Path
    expected: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    root: Path

    def inputs(self, model: str) -> dict[str, torch.Tensor]:
        """Return the fixed inputs for scoring the bundles of a model."""
        prefix = f"input/{model}/"
        tensors = self.tensors.items()
        return {name.removeprefix(prefix): t for name, t in tensors if name.startswith(prefix)}

    def scores(self, key: str) -> NDArray[np.float32]:
        """Return the stored scores or vectors of a key, such as ``torch/<sha256 of a bundle>``."""
        return self.tensors[key].numpy()


@functools.cache
def load_fixture(name: str) -> Fixture:
    """Return a fixture by its name, unpacked to a folder that no test may change."""
    (folder,) = [path for path in fixtures() if path.name == name]
    root = Path(_SCRATCH.name) / name
    unpack(folder, root)
    expected = json.loads((folder / "expected.json").read_text())
    return Fixture(folder, expected, load_file(folder / "expected.safetensors"), root)


NAMES = [path.name for path in fixtures()]
EXPECTED = {path.name: json.loads((path / "expected.json").read_text()) for path in fixtures()}
WITH_ORDERS = [name for name in NAMES if "finished" in EXPECTED[name]]


def copy_home(name: str, into: Path) -> Path:
    """Copy a fixture's home for a test that changes it, and return the copy."""
    shutil.copytree(load_fixture(name).root, into)
    return into


def enter(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    """Set the environment to use the home in ``root``."""
    monkeypatch.setenv("RECPRESS_HOME", str(root / "recpress"))
    monkeypatch.setenv("RECPRESS_TRITON", str(root / "triton"))
    monkeypatch.setenv("RECPRESS_ALLOWED_MODULES", "tests.stored_home.networks")
    monkeypatch.setenv("RECPRESS_USER", "tester")


def artifact(sha256: str) -> Artifact:
    """Return an artifact of the current store by its hash."""
    return store().artifact(f"artifacts/{sha256}")


def require_equal(
    actual: NDArray[np.float32], expected: NDArray[np.float32], fixture: Fixture, bundle: str | None
) -> None:
    """Require equal scores in the stored environment, and scores within rounding in others.

    Args:
        actual: scores of the current code.
        expected: stored scores.
        fixture: the fixture; its environment is compared with the current one.
        bundle: SHA-256 of the bundle whose plan sets the tolerance; None for an original model.

    Raises:
        AssertionError: the scores differ.
        ParityLost: the scores of a layer with quantized inputs differ too much.
    """
    plan = None if bundle is None else read(local(artifact(bundle))).plan
    formats = {line.format for line in plan.lines} if plan is not None else set()
    if environment() == fixture.expected["environment"]:
        np.testing.assert_array_equal(actual, expected)
    elif formats & INPUT_QUANTIZING_FORMATS:
        check_parity(expected, actual, plan, "onnxruntime")
    else:
        spread = float(np.nanstd(expected))
        np.testing.assert_allclose(actual, expected, rtol=0, atol=ROUNDING * spread)


def bundle_of(graph: str, expected: dict[str, Any]) -> str | None:
    """Return the hash of a graph's compressed bundle; None for a graph of an original model."""
    for recipe in expected["recipes"].values():
        if recipe["graph"] == graph:
            return str(recipe["bundle"])
    for report in expected.get("registry", {"show": {}})["show"].values():
        if graph in [target["artifact"]["sha256"] for target in report["targets"]]:
            return str(report["compressed"]["sha256"])
    return None
