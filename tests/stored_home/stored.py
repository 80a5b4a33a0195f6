"""Stored homes as the tests read them: unpacked once, with what is expected of them."""

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
from compressors.lower.parity import compare
from infra.bundle.bundle_folder import read
from tasks.orchestration.workspace import local, store
from tests.stored_home.archive import fixtures, unpack
from tests.stored_home.scores import environment

ROUNDS_INPUTS = {"static_int8", "weight_int8", "weight_int4", "float8_dense"}
"""Formats whose layers round their inputs: one on an edge between two levels may go either way."""
ROUNDING = 1e-5
"""Difference in another order of float sums, as a share of the spread of the scores.

Four layers of at most 51 products, each rounded to 2 ** -24: 4 * 51 * 6e-8 = 1.2e-5. With torch's
kernels for SSE the largest of 93 bundles is 5e-7, with MKL's common path 9e-7.
"""
_SCRATCH = tempfile.TemporaryDirectory(prefix="stored-home-")


@dataclass(frozen=True)
class Fixture:
    """A stored home and what is expected of it, both read once."""

    folder: Path
    expected: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    root: Path

    def inputs(self, model: str) -> dict[str, torch.Tensor]:
        """The inputs that bundles of a model are scored on."""
        prefix = f"input/{model}/"
        held = self.tensors.items()
        return {name.removeprefix(prefix): t for name, t in held if name.startswith(prefix)}

    def scores(self, key: str) -> NDArray[np.float32]:
        """Stored scores or vectors."""
        return self.tensors[key].numpy()


@functools.cache
def stored(name: str) -> Fixture:
    """A fixture by its name, unpacked into a folder that no test changes."""
    (folder,) = [path for path in fixtures() if path.name == name]
    root = Path(_SCRATCH.name) / name
    unpack(folder, root)
    expected = json.loads((folder / "expected.json").read_text())
    return Fixture(folder, expected, load_file(folder / "expected.safetensors"), root)


NAMES = [path.name for path in fixtures()]
EXPECTED = {path.name: json.loads((path / "expected.json").read_text()) for path in fixtures()}
WITH_ORDERS = [name for name in NAMES if "finished" in EXPECTED[name]]


def copied(name: str, into: Path) -> Path:
    """A copy of a fixture's home, for a test that changes it."""
    shutil.copytree(stored(name).root, into)
    return into


def enter(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    """Use the home below ``root``."""
    monkeypatch.setenv("RECPRESS_HOME", str(root / "recpress"))
    monkeypatch.setenv("RECPRESS_TRITON", str(root / "triton"))
    monkeypatch.setenv("RECPRESS_ALLOWED_MODULES", "tests.stored_home.networks")
    monkeypatch.setenv("RECPRESS_USER", "tester")


def artifact(sha256: str) -> Artifact:
    return store().artifact(f"artifacts/{sha256}")


def require_equal(
    found: NDArray[np.float32], expected: NDArray[np.float32], fixture: Fixture, bundle: str | None
) -> None:
    """Compare scores: every bit on the processor they were stored on, rounding elsewhere.

    Args:
        found: of the present code.
        expected: as stored.
        fixture: whose environment is compared.
        bundle: whose plan says how much rounding there is; None for an untouched model.
    """
    plan = None if bundle is None else read(local(artifact(bundle))).plan
    formats = {line.format for line in plan.lines} if plan is not None else set()
    if environment() == fixture.expected["environment"]:
        np.testing.assert_array_equal(found, expected)
    elif formats & ROUNDS_INPUTS:
        compare(expected, found, plan, "onnxruntime")
    else:
        spread = float(np.nanstd(expected))
        np.testing.assert_allclose(found, expected, rtol=0, atol=ROUNDING * spread)


def bundle_of(graph: str, expected: dict[str, Any]) -> str | None:
    """The compressed bundle that a graph was lowered from; None for an untouched model."""
    for recipe in expected["recipes"].values():
        if recipe["graph"] == graph:
            return str(recipe["bundle"])
    for report in expected.get("registry", {"show": {}})["show"].values():
        if graph in [target["artifact"]["sha256"] for target in report["targets"]]:
            return str(report["compressed"]["sha256"])
    return None
