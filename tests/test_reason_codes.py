"""Reason codes: every reason has its fields and is documented, and stored ones can be read.

A reason explains a decision of a plan or verdict: a code and fields, from which a sentence follows.
"""

import copy
import json

import pytest
from pydantic import ValidationError
from reason_codes import TABLE, page
from source_calls import calls_of, has_code_and_fields

from compressors.contracts import Judgement, Limit, Plan, PlanLine, Verdict
from compressors.contracts.coded_error import field_names
from compressors.contracts.reasons import SENTENCES, SUBJECTS, Reason, join_reasons

REASON_CALLS = calls_of({"Reason"})


def test_reasons_are_created_with_a_literal_code_and_exactly_its_fields():
    assert [
        position for position, call in REASON_CALLS if not has_code_and_fields(call, SENTENCES)
    ] == []


def test_every_code_is_created_somewhere():
    assert {call.args[0].value for _, call in REASON_CALLS} == set(SENTENCES)


def test_codes_of_all_subjects_differ():
    assert len(SENTENCES) == sum(map(len, SUBJECTS.values()))


def test_reason_page_in_the_docs_is_up_to_date():
    assert TABLE.read_text() == page(), "run python -m tests.reason_codes"


def test_sentences_are_clauses_with_named_fields():
    for code, sentence in SENTENCES.items():
        assert not sentence.endswith("."), code
        assert all(name.isidentifier() for name in (code, *field_names(sentence))), code


# --- the value -------------------------------------------------------------------------------

INNER = Reason("shares_weight", unit="item")
NESTED = Reason("shares_width", width="hidden[0]", layer="out", why=(INNER, Reason("not_tried")))


def line(**changes: object) -> PlanLine:
    """Return a plan line with default values in all other fields."""
    default_fields = {
        "module": "user",
        "role": "table",
        "format": "f",
        "bytes_before": 2,
        "bytes_after": 1,
    }
    return PlanLine.model_validate({**default_fields, "reasons": (INNER,), **changes})


def test_sentence_is_derived_from_the_fields_of_a_reason():
    reason = Reason(
        "better_format", format="a", bytes=1000, step="b", step_bytes=20_000, rows=3000, dim=4
    )
    assert str(reason) == (
        "stored as a, which is better and takes 1,000 bytes: b would take 20,000 for 3,000 x 4"
    )


def test_reasons_in_fields_are_rendered_one_after_the_other():
    assert str(NESTED) == "shares hidden[0] with 'out': shares its weight with item; not tried"
    changes = (Reason("mean_change", change=0.5), Reason("top20_overlap", share=0.25))
    assert str(Reason("score_changes", changes=changes)) == (
        "scores against the baseline: mean change 0.5, top-20 overlap 25.0%"
    )
    assert [reason.code for reason in NESTED.walk()] == [
        "shares_width",
        "shares_weight",
        "not_tried",
    ]


@pytest.mark.parametrize(
    ("code", "fields"),
    [
        ("unknown", {}),
        ("zeros", {}),
        ("zeros", {"share": 0.5, "count": 1}),
        ("zeros", {"share": [0.5]}),
        ("zeros", {"share": "half"}),
    ],
)
def test_unknown_code_other_fields_or_types_raise_a_type_error(code, fields):
    with pytest.raises(TypeError):
        Reason(code, **fields)


def test_reasons_with_the_same_code_and_fields_are_equal_and_hash_the_same():
    same = Reason("shares_weight", unit="item")
    assert same == INNER
    assert hash(same) == hash(INNER)
    assert Reason("shares_weight", unit="city") != INNER
    assert copy.deepcopy(NESTED) == NESTED


@pytest.mark.parametrize(
    "reason",
    [
        NESTED,
        Reason("zeros", share=1.0),
        Reason("columns_unread", columns=(1, 4)),
        Reason("beyond_largest", largest=float("nan"), format="float16", limit=65504.0),
    ],
    ids=lambda reason: reason.code,
)
def test_json_round_trip_keeps_code_field_types_and_sentence(reason):
    loaded = PlanLine.model_validate_json(line(reasons=(reason,)).model_dump_json()).reasons
    assert loaded == (reason,)
    assert repr(loaded[0]) == repr(reason)
    assert str(loaded[0]) == str(reason)


def test_number_that_is_not_finite_is_rendered_as_python_formats_it():
    beyond = Reason("beyond_largest", largest=float("inf"), format="float16", limit=65504.0)
    assert str(beyond) == "has a value of inf, beyond the largest number of float16, 65504"


# --- stored documents ------------------------------------------------------------------------


def stored_values() -> list[tuple[PlanLine | Plan | Judgement | Verdict, str, str, object]]:
    """Return objects with reasons, each with two names of fields and a sentence.

    The first field has the reasons, the second the derived sentence.
    """
    limit = Limit(metric="auc", against="baseline", at_least=0.0)
    judgement = Judgement(
        limit=limit, measured=None, outcome="accepted", reasons=(Reason("limit_met"),)
    )
    verdict = Verdict(target="onnxruntime", outcome="accepted", reasons=(INNER, NESTED))
    return [
        (line(), "reasons", "reason", str(INNER)),
        (line(warnings=(NESTED,)), "warnings", "warning", str(NESTED)),
        (Plan(reasons=(INNER, NESTED)), "reasons", "remarks", [str(INNER), str(NESTED)]),
        (judgement, "reasons", "reason", "accepted"),
        (verdict, "reasons", "reason", join_reasons((INNER, NESTED))),
    ]


@pytest.mark.parametrize(("value", "reasons", "sentence", "text"), stored_values())
def test_stored_json_has_codes_and_fields_and_the_derived_sentence(value, reasons, sentence, text):
    document = json.loads(value.model_dump_json())
    assert document[sentence] == text
    assert all(item.keys() == {"code", "fields"} for item in document[reasons])
    assert type(value).model_validate(document) == value
    assert type(value).model_validate(value.model_dump()) == value


@pytest.mark.parametrize(("value", "reasons", "sentence", "text"), stored_values())
def test_document_with_sentences_only_is_read_as_written(value, reasons, sentence, text):
    document = json.loads(value.model_dump_json())
    del document[reasons]
    loaded = type(value).model_validate(document)
    texts = text if isinstance(text, list) else [text]
    assert getattr(loaded, reasons) == tuple(Reason("as_written", text=item) for item in texts)
    assert json.loads(loaded.model_dump_json())[sentence] == text


@pytest.mark.parametrize(("value", "reasons", "sentence", "text"), stored_values())
def test_document_with_sentences_only_is_written_unchanged(value, reasons, sentence, text):
    """A stored task result is accepted only if it would be written in the same way."""
    document = json.loads(value.model_dump_json())
    del document[reasons]
    loaded = type(value).model_validate(document)
    assert json.loads(loaded.model_dump_json(exclude_unset=True)) == document


@pytest.mark.parametrize(
    "unknown",
    [
        {"code": "of_a_later_version", "fields": {}},
        {"code": "zeros", "fields": {"share": "half"}},
        {"code": "zeros", "fields": {"share": 0.5, "of_a_later_version": 1}},
    ],
)
@pytest.mark.parametrize(("value", "reasons", "sentence", "text"), stored_values())
def test_unknown_reasons_are_read_as_their_sentence(value, reasons, sentence, text, unknown):
    document = json.loads(value.model_dump_json())
    document[reasons][0] = unknown
    loaded = type(value).model_validate(document)
    assert {reason.code for reason in getattr(loaded, reasons)} == {"as_written"}
    assert json.loads(loaded.model_dump_json())[sentence] == text


@pytest.mark.parametrize("reason", [None, 3, ["a", 1]])
def test_line_without_a_sentence_or_reasons_raises_a_validation_error(reason):
    document = json.loads(line().model_dump_json())
    del document["reasons"]
    with pytest.raises(ValidationError):
        PlanLine.model_validate({**document, "reason": reason})


@pytest.mark.parametrize(
    "stored_reason",
    [
        "text",
        {"code": "not_tried"},
        {"code": "not_tried", "fields": {}, "more": 1},
        {"code": "zeros", "fields": {"share": None}},
        {"code": 1, "fields": {}},
    ],
)
def test_an_invalid_reason_without_a_sentence_raises_a_validation_error(stored_reason):
    document = json.loads(line().model_dump_json())
    del document["reason"]
    with pytest.raises(ValidationError):
        PlanLine.model_validate({**document, "reasons": [stored_reason]})
