"""Promotion, rollback and fetch: the ledger, the registry's alias, and refused versions.

The ledger is the list of a model's promotions and rollbacks in the store. Publishing an accepted
order moves the alias ``candidate`` to its version. ``fill("ab", "a")`` publishes the orders
"aaa..." and "bbb..." as versions 1 and 2, and promotes the first (``conftest.py``).
"""

from pathlib import Path

import pytest
from error_codes import raises_code
from triton_versions import Fill, promote_during_next_promotion, publish_version

from compressors.contracts import Outcome
from infra.errors import AlreadyThere, ArtifactDamaged, ArtifactMissing, PromotionRefused
from infra.registry.ledger import Ledger
from infra.settings import public_uri
from tasks import publish as publishing
from tasks.orchestration.order_records import find_finished_order
from tasks.orchestration.workspace import store
from tasks.promotion.promotions import (
    champion_graph,
    fetch,
    promote,
    registry,
    repair,
    rollback,
    version_report,
    whoami,
)


def aliases(model: str = "m") -> dict[str, str]:
    """Return the version number of each alias of a model."""
    return {alias: item.version for item in registry().versions(model) for alias in item.aliases}


def test_order_is_registered_once_with_its_tags(work_folder: Path) -> None:
    first = publish_version(work_folder, "a")
    repeated = publish_version(work_folder, "a")
    assert (first, len(registry().versions("m"))) == (repeated, 1)
    version, report = version_report("m", "@candidate")
    assert report == first.report
    assert version.source == first.release.uri
    target = report.targets[0]
    assert {
        "recpress.order": "a" * 64,
        "recpress.outcome": "accepted",
        "recpress.bundle": "m@1",
        "recpress.verdict.tensorrt-rtx": "built-unmeasured",
        "recpress.sha256.onnxruntime": target.artifact.sha256,
        "recpress.limits": "auc vs baseline >= -0.002",
    }.items() <= version.tags.items()


def test_finished_order_is_found_until_its_files_are_missing(work_folder: Path) -> None:
    finished = publish_version(work_folder, "a")
    assert find_finished_order("a" * 64) == finished
    assert find_finished_order("b" * 64) is None
    served = finished.report.targets[1].artifact
    folder = work_folder / "recpress" / "store" / "artifacts" / served.sha256
    (folder / "manifest.json").unlink()
    assert find_finished_order("a" * 64) is None


def test_require_published_raises_if_registry_or_store_lost_the_result(
    work_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = publish_version(work_folder, "a")
    publishing.require_published(finished)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{work_folder / 'other.db'}")
    with raises_code(ArtifactMissing, "order_no_longer_in_registry", order="a" * 64):
        publishing.require_published(finished)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    stored_release = work_folder / "recpress" / "store" / "artifacts" / finished.release.sha256
    (stored_release / "manifest.json").unlink()
    with raises_code(ArtifactMissing, "artifact_missing"):
        publishing.require_published(finished)


@pytest.mark.parametrize("outcome", ["rejected", "undecided", "built-unmeasured"])
def test_only_an_accepted_version_becomes_candidate_or_champion(
    work_folder: Path, outcome: Outcome
) -> None:
    version = publish_version(work_folder, "a", outcomes={"onnxruntime": outcome}).version
    assert aliases() == {}
    with raises_code(PromotionRefused, "not_accepted", version=version, outcome=outcome):
        promote("m", version, reason="")
    assert Ledger(store(), "m").entries() == ()
    assert aliases() == {}


def test_promotion_writes_user_and_reason_to_the_ledger_and_moves_the_alias(
    work_folder: Path, fill: Fill
) -> None:
    (version,) = fill("a", "")
    entry = promote("m", "@candidate", reason="smaller and as good")
    assert (entry.version, entry.by, entry.reason) == (version, "tester", "smaller and as good")
    assert entry.order == "a" * 64
    assert aliases() == {"candidate": version, "champion": version}


def test_promoting_the_champion_again_changes_nothing(work_folder: Path, fill: Fill) -> None:
    (version,) = fill("a", "")
    first = promote("m", version, reason="once")
    assert promote("m", version, reason="twice") == first
    assert len(Ledger(store(), "m").entries()) == 1


def test_rollback_promotes_the_previous_version_and_is_refused_without_one(
    work_folder: Path, fill: Fill
) -> None:
    one, two = fill("ab", "")
    promote("m", one, reason="")
    with raises_code(PromotionRefused, "earlier_champion_missing", model="m", entries=1):
        rollback("m", reason="")
    promote("m", two, reason="")
    entry = rollback("m", reason="clicks fell")
    assert (entry.action, entry.version, entry.previous) == ("rollback", one, two)
    assert aliases()["champion"] == one
    with raises_code(PromotionRefused, "earlier_champion_missing", model="m", entries=3):
        rollback("m", reason="")


def test_moved_alias_is_repaired_from_the_ledger(work_folder: Path) -> None:
    one = publish_version(work_folder, "a").version
    two = publish_version(work_folder, "b", outcomes={"onnxruntime": "rejected"}).version
    promote("m", one, reason="")
    registry().set_alias("m", "champion", two)
    version, report = version_report("m", "@champion")
    assert (version.version, report.outcome) == (one, "accepted")
    assert aliases()["champion"] == one
    registry().set_alias("m", "champion", two)
    repair("m")
    assert aliases()["champion"] == one


def test_champion_alias_without_a_ledger_is_ignored(work_folder: Path, fill: Fill) -> None:
    (version,) = fill("a", "")
    registry().set_alias("m", "champion", version)
    with raises_code(PromotionRefused, "champion_missing", model="m"):
        version_report("m", "@champion")
    assert champion_graph("m", "onnxruntime") is None


def test_the_second_of_two_concurrent_promotions_is_refused(
    work_folder: Path, fill: Fill, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = fill("ab", "")
    promote_during_next_promotion(one, monkeypatch)
    with raises_code(AlreadyThere, "ledger_moved_on", reason="concurrent"):
        promote("m", two, reason="refused")
    assert aliases()["champion"] == one


def test_champion_graph_is_the_artifact_of_the_promoted_version(work_folder: Path) -> None:
    finished = publish_version(work_folder, "a")
    assert champion_graph("unknown", "onnxruntime") is None
    assert champion_graph("m", "onnxruntime") is None
    promote("m", finished.version, reason="")
    assert champion_graph("m", "onnxruntime") == finished.report.targets[0].artifact


# --- fetch ----------------------------------------------------------------------------------


def test_fetch_copies_the_requested_target(work_folder: Path) -> None:
    finished = publish_version(work_folder, "a")
    registered, target = fetch("m", finished.version, "onnxruntime", work_folder / "out")
    assert registered.version == finished.version
    assert target == finished.report.targets[0]
    assert (work_folder / "out" / "model.onnx").read_text() == f"onnxruntime {'a' * 64}"


@pytest.mark.parametrize(
    ("outcome", "option"),
    [
        ("built-unmeasured", "unmeasured"),
        ("rejected", "unaccepted"),
        ("undecided", "unaccepted"),
    ],
)
def test_target_without_acceptance_is_fetched_only_with_its_option(
    work_folder: Path, outcome: Outcome, option: str
) -> None:
    version = publish_version(work_folder, "a", outcomes={"onnxruntime": outcome}).version
    into = work_folder / "out"
    other_option = {"unmeasured": "unaccepted", "unaccepted": "unmeasured"}[option]
    code = "target_unmeasured" if option == "unmeasured" else "target_not_accepted"
    for options in ({}, {other_option: True}):
        with raises_code(PromotionRefused, code, version=version) as caught:
            fetch("m", version, "onnxruntime", into, **options)
        assert f"--{option}" in str(caught.value)
        assert not into.exists()
    fetch("m", version, "onnxruntime", into, **{option: True})
    assert into.is_dir()


def test_fetch_of_a_missing_target_is_refused_with_the_existing_targets(
    work_folder: Path, fill: Fill
) -> None:
    (version,) = fill("a", "")
    targets = ("onnxruntime", "tensorrt-rtx")
    with raises_code(ArtifactMissing, "target_missing", target="tensorrt", targets=targets):
        fetch("m", version, "tensorrt", work_folder / "out")


def test_fetch_of_damaged_files_is_refused_before_writing(work_folder: Path) -> None:
    finished = publish_version(work_folder, "a")
    sha256 = finished.report.targets[0].artifact.sha256
    path = work_folder / "recpress" / "store" / "artifacts" / sha256 / "files" / "model.onnx"
    path.chmod(0o644)
    path.write_text(path.read_text().replace("a", "b", 1))
    with raises_code(ArtifactDamaged, "chunk_differs", file="model.onnx", chunk=0):
        fetch("m", finished.version, "onnxruntime", work_folder / "new" / "out")
    assert not (work_folder / "new").exists()


def test_whoami_is_the_setting_or_the_login_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECPRESS_USER", "somebody")
    assert whoami() == "somebody"
    monkeypatch.delenv("RECPRESS_USER")
    monkeypatch.setenv("LOGNAME", "logged-in")
    assert whoami() == "logged-in"


@pytest.mark.parametrize(
    ("uri", "public"),
    [
        ("postgresql://me:canary@db.example/m", "postgresql://db.example/m"),
        ("postgresql://db.example/m?user=u&password=canary", "postgresql://db.example/m"),
        ("https://me:can@ary@host/m", "https://host/m"),
        ("https://me:can/ary@host/m", "https://host/m"),
        ("s3://KEY:canary@bucket/prefix", "s3://bucket/prefix"),
        ("sqlite:////srv/registry.db", "sqlite:////srv/registry.db"),
    ],
)
def test_shown_uri_has_no_credentials(uri: str, public: str) -> None:
    assert public_uri(uri) == public
