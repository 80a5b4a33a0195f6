"""Promotion with a lost, restored or changed registry: orders are identified by their digest.

The ledger, the list of a model's promotions and rollbacks, is in the object store, so it remains if
the registry is lost. ``fill("ab", "a")`` publishes the orders "aaa..." and "bbb..." as versions 1
and 2, and promotes the first (``conftest.py``). ``repair`` sets the registry's alias and the Triton
repository to what the ledger says; ``export`` writes the champion to a Triton repository (None:
that of the settings).
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from error_codes import raises_code
from reports import store_files
from triton_configs import loaded_version
from triton_versions import Fill, graph_bytes, publish_version

from compressors.contracts import Estimate, Judgement, Limit
from infra.errors import ArtifactDamaged, PromotionRefused, RecordRefused, Refused, TritonRefused
from infra.registry.ledger import Entry, Ledger
from tasks.orchestration.documents import Finished, TargetReport
from tasks.orchestration.workspace import store
from tasks.promotion.champion import champion_versions
from tasks.promotion.promotions import (
    champion_graph,
    export,
    fetch,
    promote,
    promote_order,
    registry,
    repair,
    rollback,
    triton_contents,
    version_page,
    version_report,
)
from tasks.publish import restore

A, B, C = ("a" * 64, "b" * 64, "c" * 64)


@pytest.fixture
def lose_registry(
    empty_registry: Path, work_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], None]:
    """A function that replaces the registry by an empty one."""

    def use_empty_registry() -> None:
        shutil.copy(empty_registry, work_folder / "other.db")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{work_folder / 'other.db'}")

    return use_empty_registry


def champion_alias() -> str | None:
    """Return the version with the alias ``champion``; None if there is none."""
    versions = registry().versions("m")
    return next((item.version for item in versions if "champion" in item.aliases), None)


def fetch_champion_order(work_folder: Path) -> str:
    """Fetch the champion, and return the digest of its order."""
    shutil.rmtree(work_folder / "out", ignore_errors=True)
    fetch("m", "@champion", "onnxruntime", work_folder / "out")
    return (work_folder / "out" / "model.onnx").read_text().removeprefix("onnxruntime ")


def test_champion_is_found_by_its_order_under_another_version_number(
    work_folder: Path, triton: Path, lose_registry: Callable[[], None]
) -> None:
    graph = publish_version(work_folder, "a").report.targets[0].artifact
    promote("m", "1", reason="good")
    lose_registry()
    publish_version(work_folder, "b", outcomes={"onnxruntime": "rejected"})
    assert publish_version(work_folder, "a").version == "2"
    registered, report = version_report("m", "@champion")
    assert (registered.version, report.order) == ("2", A)
    assert champion_alias() == "2"
    assert fetch_champion_order(work_folder) == A
    assert champion_graph("m", "onnxruntime") == graph
    assert version_page("m", "@champion")[0].version == "2"
    repaired = repair("m")
    assert repaired is not None
    assert repaired.version == "2"
    assert loaded_version(triton) == ("2", graph_bytes("a"))
    assert {item.served for item in export("m", None)} == {"2"}
    # Sound: a server that starts now loads the champion, and its files are undamaged.
    assert all(item.sound for item in triton_contents("m", None))
    assert promote("m", "2", reason="again").order == A
    assert len(Ledger(store(), "m").entries()) == 1


def test_rollback_restores_the_previous_order_under_its_new_version_number(
    work_folder: Path, fill: Fill, lose_registry: Callable[[], None]
) -> None:
    fill("ab", "ab")
    lose_registry()
    for order_digit in "cba":
        publish_version(work_folder, order_digit)
    entry = rollback("m", reason="clicks fell")
    assert (entry.order, entry.version, champion_alias()) == (A, "3", "3")
    assert Ledger(store(), "m").champion() == entry


def test_champion_missing_in_the_registry_is_refused_by_every_function(
    work_folder: Path, fill: Fill, triton: Path, lose_registry: Callable[[], None]
) -> None:
    fill("ab", "ab")
    lose_registry()
    other = publish_version(
        work_folder, "c"
    ).version  # gets number 1, which order "aaa..." had before
    registry().set_alias("m", "champion", other)
    functions: dict[str, Callable[[], Any]] = {
        "report": lambda: version_report("m", "@champion"),
        "page": lambda: version_page("m", "@champion"),
        "fetch": lambda: fetch("m", "@champion", "onnxruntime", work_folder / "out"),
        "repair": lambda: repair("m"),
        "rollback": lambda: rollback("m", reason=""),
        "export": lambda: export("m", None),
        "show": lambda: triton_contents("m", None),
        "compare": lambda: champion_graph("m", "onnxruntime"),
    }
    for name, function in functions.items():
        with raises_code(PromotionRefused, "champion_not_registered", model="m"):
            function()
        assert not (work_folder / "out").exists(), name
    with raises_code(PromotionRefused, "champions_unusable") as caught:
        champion_versions()
    assert "m: The ledger names order bbbbbbbbbbbb" in caught.value.fields["problems"]
    assert champion_alias() == other, "nothing was repaired to another order"
    assert loaded_version(triton) == ("2", graph_bytes("b"))
    assert len(Ledger(store(), "m").entries()) == 2


def test_restore_registers_every_result_under_its_former_number(
    work_folder: Path, lose_registry: Callable[[], None]
) -> None:
    for order_digit in "cab":
        publish_version(work_folder, order_digit)
    publish_version(work_folder, "d", outcomes={"onnxruntime": "rejected"})
    promote("m", "1", reason="")
    promote("m", "2", reason="")
    before = registry().versions("m")
    lose_registry()
    assert [item.version for item in restore("m")] == ["1", "2", "3", "4"]
    assert registry().versions("m") == before
    assert restore("m") == ()
    assert restore("other") == ()
    assert champion_versions() == {"m": "2"}
    registry().set_alias("m", "champion", "1")
    with raises_code(PromotionRefused, "champions_unusable") as caught:
        champion_versions()
    assert "promote m --version 2" in caught.value.fields["problems"]
    assert rollback("m", reason="").order == C


def test_promotion_does_not_overwrite_the_served_files_of_another_order(
    work_folder: Path, fill: Fill, triton: Path, lose_registry: Callable[[], None]
) -> None:
    fill("a", "a")
    lose_registry()
    other = publish_version(work_folder, "b").version
    with raises_code(TritonRefused, "version_of_other_order", version=1, model="m"):
        promote("m", other, reason="")
    assert loaded_version(triton) == ("1", graph_bytes("a"))
    restore("m")  # order "aaa..." gets version 2, since order "bbb..." has version 1
    promote("m", other, reason="")
    assert loaded_version(triton) == ("1", graph_bytes("b"))
    assert (triton / "m" / "2" / "model.onnx").read_bytes() == graph_bytes("a")


def test_promote_order_promotes_the_version_with_the_digest(
    work_folder: Path, fill: Fill, lose_registry: Callable[[], None]
) -> None:
    fill("a", "")
    lose_registry()
    publish_version(work_folder, "b")
    with raises_code(PromotionRefused, "order_not_registered", order=A, model="m"):
        promote_order("m", A, reason="")
    publish_version(work_folder, "a")
    assert promote_order("m", A, reason="").version == "2"


# --- changed entries -------------------------------------------------------------------------


def change_entry(sequence: int, old: str, new: str) -> None:
    """Replace a text that occurs once in the ledger entry with this number."""
    key = f"ledger/m/{sequence:08d}.json"
    text = store().read(key).decode()
    assert text.count(old) == 1
    store().write(key, text.replace(old, new).encode())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"version": "2"', '"version": "1"'),
        (f'"{B}"', f'"{A}"'),
        (f'"{B}"', f'"{"b" * 63}c"'),
        ('"action": "promote"', '"action": "rollback"'),
        ('"by": "tester"', '"by": "tesser"'),
    ],
)
def test_ledger_entry_with_a_changed_value_is_refused(
    work_folder: Path, fill: Fill, old: str, new: str
) -> None:
    fill("ab", "ab")
    change_entry(2, old, new)
    for function in (lambda: version_report("m", "@champion"), lambda: rollback("m", reason="")):
        with pytest.raises(ArtifactDamaged) as caught:
            function()
        assert "00000002.json" in str(caught.value)
    assert champion_alias() == "2"


def write_without_digests(entries: tuple[Entry, ...]) -> None:
    """Overwrite ledger entries like an earlier version of recpress, without digests.

    The digest of an entry covers its fields and the digest of the entry before it.
    """
    for entry in entries:
        text = entry.model_dump_json(indent=1, exclude={"digest"})
        store().write(f"ledger/m/{entry.sequence:08d}.json", text.encode())


def test_ledger_without_digests_is_read_and_continued(work_folder: Path, fill: Fill) -> None:
    fill("ab", "ab")
    rollback("m", reason="")
    write_without_digests(Ledger(store(), "m").entries())
    promote("m", publish_version(work_folder, "c").version, reason="")
    entries = Ledger(store(), "m").entries()
    assert [entry.digest is None for entry in entries] == [True, True, True, False]
    change_entry(3, '"by": "tester"', '"by": "tesser"')
    with raises_code(ArtifactDamaged, "ledger_digest_differs") as caught:
        Ledger(store(), "m").entries()
    assert caught.value.fields["changed"].endswith("00000004.json or the entry before it")


def test_ledger_entry_without_its_digest_after_one_with_digest_is_refused(
    work_folder: Path, fill: Fill
) -> None:
    fill("ab", "ab")
    write_without_digests(Ledger(store(), "m").entries()[1:])
    with raises_code(ArtifactDamaged, "ledger_digest_missing"):
        Ledger(store(), "m").entries()


# An order that was rejected, one that was never published, and a text that is no digest.
@pytest.mark.parametrize("order", [C, f"{'a' * 63}b", "?"])
def test_ledger_entry_without_digest_of_another_order_is_refused(
    work_folder: Path, fill: Fill, order: str
) -> None:
    fill("a", "a")
    publish_version(work_folder, "c", outcomes={"onnxruntime": "rejected"})
    (entry,) = Ledger(store(), "m").entries()
    write_without_digests((entry.model_copy(update={"order": order}),))
    for function in (lambda: repair("m"), lambda: version_report("m", "@champion")):
        with pytest.raises(Refused) as caught:
            function()
        assert caught.value.code in {"not_accepted", "champion_not_registered", "order_invalid"}
    assert champion_alias() == "1"


# --- reports that do not allow a promotion ---------------------------------------------------


def judgement(limit: str, low: float, outcome: str, *, measured: bool = True) -> Judgement:
    """Return a judgement (the outcome for one limit) that may contradict its measurement.

    Args:
        limit: the limit as text.
        low: lower bound of the measured interval, which is 0.001 wide.
        outcome: the outcome.
        measured: whether the judgement has a measurement.
    """
    estimate = Estimate(point=low + 0.0005, low=low, high=low + 0.001, rows=100)
    return Judgement.model_validate(
        {
            "limit": Limit.parse(limit).model_dump(),
            "measured": estimate.model_dump() if measured else None,
            "outcome": outcome,
            "reasons": [{"code": "as_written", "fields": {"text": "as measured"}}],
        }
    )


LIMIT = "auc vs baseline >= -0.002"


def change_verdict(finished: Finished, **fields: Any) -> tuple[TargetReport, ...]:
    """Return the targets of an order's report with changed fields in the first one's verdict.

    Args:
        finished: the published order.
        fields: fields of the verdict to replace.
    """
    first = finished.report.targets[0]
    verdict = first.verdict.model_copy(update=fields).model_dump()
    return (
        first.model_copy(update={"verdict": type(first.verdict).model_validate(verdict)}),
        *finished.report.targets[1:],
    )


@pytest.mark.parametrize(
    ("verdict", "problem"),
    [
        # The outcomes of several targets or limits "add up to" the worst of them.
        ({"outcome": "rejected"}, "add up to accepted"),
        ({"outcome": "undecided"}, "add up to accepted"),
        ({"outcome": "built-unmeasured"}, "add up to accepted"),
        ({"judgements": ()}, "judged by no limit"),
        ({"target": "tensorrt"}, "is for tensorrt"),
        ({"judgements": (judgement(LIMIT, -0.001, "rejected"),)}, "add up to rejected"),
        ({"judgements": (judgement(LIMIT, -0.01, "accepted"),)}, "add up to rejected"),
        ({"judgements": (judgement(LIMIT, -0.0025, "accepted"),)}, "add up to undecided"),
        ({"judgements": (judgement(LIMIT, 0, "accepted", measured=False),)}, "add up to undecided"),
        (
            {"judgements": (judgement("bytes <= 9", 5, "accepted"),)},
            "not judged by its limit auc",
        ),
    ],
)
def test_report_that_contradicts_itself_is_not_promoted(
    work_folder: Path, verdict: dict[str, Any], problem: str
) -> None:
    finished = publish_version(work_folder, "a")
    targets = change_verdict(finished, **verdict)
    version = publish_version(work_folder, "b", targets=targets, outcome="accepted").version
    with raises_code(PromotionRefused, "verdict_contradicts_judgements") as caught:
        promote("m", version, reason="")
    assert problem in str(caught.value)
    assert Ledger(store(), "m").entries() == ()


@pytest.mark.parametrize(
    ("outcome", "low"), [("rejected", -0.01), ("undecided", -0.0025), ("built-unmeasured", None)]
)
def test_report_whose_outcome_contradicts_its_verdicts_is_not_promoted(
    work_folder: Path, outcome: str, low: float | None
) -> None:
    judgements = () if low is None else (judgement(LIMIT, low, outcome),)
    finished = publish_version(work_folder, "a")
    targets = change_verdict(finished, outcome=outcome, judgements=judgements)
    version = publish_version(work_folder, "b", targets=targets, outcome="accepted").version
    with raises_code(PromotionRefused, "outcome_contradicts_verdicts", computed=outcome):
        promote("m", version, reason="")
    assert Ledger(store(), "m").entries() == ()


@pytest.mark.parametrize(
    ("fields", "refusal", "message"),
    [
        ({"targets": ()}, RecordRefused, "targets"),
        ({"limits": ()}, PromotionRefused, "no limits"),
    ],
)
def test_report_without_targets_or_limits_is_not_promoted(
    work_folder: Path, fields: dict[str, Any], refusal: type[Refused], message: str
) -> None:
    finished = publish_version(work_folder, "a")
    report = finished.report.model_copy(update={"order": C, **fields})
    release = store_files(work_folder / "release", report_json=report.model_dump_json())
    version = (
        registry()
        .publish("m", C, release.uri, {"recpress.outcome": "accepted"}, description="")
        .version
    )
    with pytest.raises(refusal, match=message):
        promote("m", version, reason="")


def test_report_consistent_with_its_judgements_is_promoted(work_folder: Path) -> None:
    judgements = (judgement(LIMIT, -0.001, "accepted"),)
    targets = change_verdict(publish_version(work_folder, "a"), judgements=judgements)
    assert (
        promote("m", publish_version(work_folder, "b", targets=targets).version, reason="").order
        == B
    )


def test_version_whose_tag_names_another_order_is_not_promoted(work_folder: Path) -> None:
    finished = publish_version(work_folder, "a")
    tags = {"recpress.outcome": "accepted"}
    registered = registry().publish("m", C, finished.release.uri, tags, description="")
    with raises_code(PromotionRefused, "other_release", expected=C, got=finished.report.order):
        promote("m", registered.version, reason="")
