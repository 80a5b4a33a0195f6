"""Backward compatibility: stored bundles and graphs have their stored tensors and scores.

The fixtures (stored homes) of ``tests/stored_home`` contain every registered method and every
format. A home is the folder with everything that recpress stores.
"""

import json
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from signatures import as_version_1

from compressors.core.modules.factored import FACTORED
from compressors.core.registries import COMPOSITIONS, LINEAR_FORMATS, TABLE_FORMATS
from compressors.distill.recalibrate import Method
from infra.bundle.bundle_folder import MANIFEST, read
from tasks.bundles.bundle_ref import find_bundle
from tasks.bundles.loading import load_bundle
from tasks.lower import lower_model
from tasks.orchestration.graph_documents import read_lowering
from tasks.orchestration.workspace import local
from tasks.prepare import prepare
from tests.stored_home.scores import (
    graph_scores,
    module_scores,
    out_of_range_inputs,
    tensors_digest,
)
from tests.stored_home.settings import registered_steps
from tests.stored_home.stored import (
    EXPECTED,
    NAMES,
    Fixture,
    artifact,
    bundle_of,
    copy_home,
    load_fixture,
    require_equal,
    use_home,
)

every_fixture = pytest.mark.parametrize("name", NAMES)


@pytest.fixture
def fixture(name: str, monkeypatch: pytest.MonkeyPatch) -> Fixture:
    """A stored home with its expected results, which the test only reads."""
    result = load_fixture(name)
    use_home(monkeypatch, result.root)
    return result


# --- contents of the fixtures ----------------------------------------------------------------


def test_every_registered_step_is_in_a_stored_recipe():
    recipes = [recipe for expected in EXPECTED.values() for recipe in expected["recipes"].values()]
    kinds = {step["kind"] for recipe in recipes for step in recipe["steps"]}
    assert {step().kind for step in registered_steps()} - kinds == set()


def test_every_current_format_is_in_a_stored_bundle():
    formats = {
        stored_format
        for expected in EXPECTED.values()
        for bundle in expected["bundles"].values()
        for stored_format in bundle["formats"]
    }
    current = {f"{kind}:{f}" for kind in ("table", "bag") for f in (*TABLE_FORMATS, *COMPOSITIONS)}
    current |= {f"linear:{f}" for f in (*LINEAR_FORMATS, FACTORED)}
    current |= {"norm:folded"} | {f"output:{method}" for method in get_args(Method)}
    assert current - formats == set()


@every_fixture
def test_the_fixture_has_every_expected_bundle_and_graph(fixture: Fixture):
    stored_artifacts = {path.name for path in (fixture.root / "recpress/store/artifacts").iterdir()}
    expected = {*fixture.expected["bundles"], *fixture.expected["graphs"]}
    assert expected
    assert expected <= stored_artifacts


# --- bundles and graphs ----------------------------------------------------------------------

BUNDLES = [(name, sha) for name in NAMES for sha in EXPECTED[name]["bundles"]]
GRAPHS = [(name, sha) for name in NAMES for sha in EXPECTED[name]["graphs"]]


def _id(value: str) -> str:
    """Return the test id of a bundle or graph: the name of its recipe, or the start of its hash."""
    for expected in EXPECTED.values():
        for recipe, result in expected["recipes"].items():
            if value in (result["bundle"], result["graph"]):
                return recipe
    return value[:12]


@pytest.mark.parametrize(("name", "sha"), BUNDLES, ids=_id)
def test_a_stored_bundle_has_its_tensors_and_scores(sha: str, fixture: Fixture):
    expected = fixture.expected["bundles"][sha]
    loaded = load_bundle(artifact(sha))
    assert loaded.manifest.name == expected["model"]
    assert tensors_digest(loaded.model.module) == expected["tensors"]
    scores = module_scores(loaded.model.module, fixture.inputs(expected["model"]))
    assert np.isfinite(scores).all()
    require_equal(scores, fixture.scores(f"torch/{sha}"), fixture, sha)


@pytest.mark.parametrize("name", NAMES[:1])
def test_bundles_of_schema_version_1_are_read_as_version_2_and_their_files_are_unchanged(
    fixture: Fixture,
):
    versions = set()
    for sha in fixture.expected["bundles"]:
        folder = local(artifact(sha))
        before = (folder / MANIFEST).read_bytes()
        document = json.loads(before)
        versions.add(document["schema_version"])
        manifest = read(folder)
        assert manifest.schema_version == 2
        assert as_version_1(manifest.model_dump(mode="json"))["signature"] == document["signature"]
        assert manifest.signature.single_output.name == "score"
        assert (folder / MANIFEST).read_bytes() == before
    assert versions == {1}


@pytest.mark.parametrize(("name", "sha"), GRAPHS, ids=_id)
def test_a_stored_graph_has_its_stored_scores_in_onnx_runtime(sha: str, fixture: Fixture):
    expected = fixture.expected["graphs"][sha]
    folder = local(artifact(sha))
    lowering = read_lowering(folder)
    assert [graph.name for graph in lowering.graphs] == expected["graphs"]
    inputs = fixture.inputs(expected["model"])
    for graph in lowering.graphs:
        names = tuple(item.name for item in graph.inputs)
        for kind, inputs_of_kind in (("rows", inputs), ("edge", out_of_range_inputs(inputs))):
            scores = graph_scores(folder / graph.file, names, inputs_of_kind)
            key = f"onnx/{sha}/{graph.name}/{kind}"
            require_equal(scores, fixture.scores(key), fixture, bundle_of(sha, fixture.expected))


@every_fixture
def test_a_stored_graph_has_nan_scores_only_for_out_of_range_users(fixture: Fixture):
    graphs = [
        sha for sha, result in fixture.expected["graphs"].items() if result["model"] == "clicks"
    ]
    assert graphs
    for sha in graphs:
        edge = fixture.scores(f"onnx/{sha}/model/edge")
        # row 0 has an out-of-range user; items have a default row
        assert np.flatnonzero(np.isnan(edge)).tolist() == [0]


RECIPE_GRAPHS = [(name, recipe) for name in NAMES for recipe in EXPECTED[name]["recipes"]]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "recipe"), RECIPE_GRAPHS)
def test_a_stored_bundle_is_lowered_to_a_graph_with_the_stored_scores(
    name: str, recipe: str, fixture: Fixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    use_home(monkeypatch, copy_home(name, tmp_path / "moved"))
    expected = fixture.expected["recipes"][recipe]
    bundle_ref = find_bundle(expected["model"])
    split = bundle_ref.calibration()
    probe = prepare.fn(bundle_ref.artifact, split)  # rows on which graph and module are compared
    rows = bundle_ref.rows[split]
    bundle = artifact(expected["bundle"])
    # most_rows is the largest batch that the graph must accept.
    lowered = local(lower_model.fn(bundle, "onnxruntime", probe, rows, most_rows=65_536))
    inputs = fixture.inputs(expected["model"])
    for graph in read_lowering(lowered).graphs:
        names = tuple(item.name for item in graph.inputs)
        scores = graph_scores(lowered / graph.file, names, inputs)
        key = f"onnx/{expected['graph']}/{graph.name}/rows"
        require_equal(scores, fixture.scores(key), fixture, expected["bundle"])
