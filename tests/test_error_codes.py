"""Every error with a code is raised with its fields, and documented."""

import ast
import copy
import importlib
from typing import ClassVar, get_args

import pytest
from error_codes import (
    MODULES,
    TABLE,
    coded_classes,
    example_of,
    page,
    raises_code,
    raises_value_error,
)
from pydantic import BaseModel, field_validator
from pydantic_core.core_schema import ErrorType
from source_calls import PACKAGES, ROOT, calls_of, has_code_and_fields

from compressors.contracts.coded_error import CodedError, field_names
from compressors.contracts.value_errors import SENTENCES, SUBJECTS, value_error
from compressors.errors.compression import AuditFailed, ParityLost
from compressors.errors.parity_failure import ParityFailure
from infra.credentials import clean_exceptions
from infra.errors import InfraError, PromotionRefused, Refused

BY_FIELDS = [kind for kind in coded_classes() if kind is not ParityLost]
"""Made from their fields; a ``ParityLost`` is made from a ``ParityFailure``."""
CLASSES = {kind.__name__: kind for kind in coded_classes()}
CODE_OF_FAILURE = {"ParityFailure": "ParityLost"}
"""Classes whose ``code`` becomes that of an error of another class, which is made from them."""


RAISED = calls_of(CLASSES.keys() - set(CODE_OF_FAILURE.values()))
FAILURES = calls_of(CODE_OF_FAILURE.keys())
VALUE_ERRORS = calls_of({"value_error"})


def test_classes_without_codes_are_never_raised():
    """They are for ``except`` alone."""
    roots = {kind.__name__ for kind in (InfraError, Refused)}
    assert calls_of(roots) == []


def test_errors_are_raised_with_a_code_of_their_class_and_with_its_fields():
    wrong = [
        place
        for place, call in RAISED
        if not has_code_and_fields(call, CLASSES[call.func.id].sentences)
    ]
    assert wrong == []


def test_every_code_is_raised_somewhere():
    used = {(call.func.id, call.args[0].value) for _, call in RAISED}
    for _, call in FAILURES:
        (code,) = (keyword.value.value for keyword in call.keywords if keyword.arg == "code")
        used.add((CODE_OF_FAILURE[call.func.id], code))
    listed = {(name, code) for name, kind in CLASSES.items() for code in kind.sentences}
    assert used == listed


def test_classes_with_codes_are_in_the_documented_modules():
    def subclasses(kind: type) -> set[type]:
        return {kind} | {below for one in kind.__subclasses__() for below in subclasses(one)}

    for package in (
        "compressors.errors.compression",
        "infra.errors",
        "flows.cli.errors",
        "tasks.orchestration.documents",
    ):
        importlib.import_module(package)
    ours = {kind for kind in subclasses(CodedError) if kind.__module__.split(".")[0] in PACKAGES}
    outside = {kind for kind in ours if kind.__module__ not in (*MODULES, CodedError.__module__)}
    assert outside == set()


def test_documented_table_is_that_of_the_classes():
    assert TABLE.read_text() == page(), "run python -m tests.error_codes"


@pytest.mark.parametrize("kind", coded_classes(), ids=lambda kind: kind.__name__)
def test_sentences_end_with_a_full_stop_and_have_named_fields(kind):
    for code, sentence in kind.sentences.items():
        assert code.isidentifier(), code
        assert sentence.endswith((".", "}")), code
        assert all(name.isidentifier() for name in field_names(sentence)), code


# --- the base class --------------------------------------------------------------------------


class Example(CodedError):
    """An example."""

    sentences: ClassVar = {
        "wrong_count": "Expected {expected:,} of {names}, got {got!r}. Count again.",
        "not_fitting": "{missing: and } are missing; there is {found:; }.",
    }


def example() -> Example:
    return Example("wrong_count", expected=1000, names=("a", "b"), got="x")


def test_sentence_is_made_from_the_fields():
    assert str(example()) == "Expected 1,000 of a, b, got 'x'. Count again."
    assert example().fields == {"expected": 1000, "names": ("a", "b"), "got": "x"}


def test_lists_and_mappings_are_written_with_the_separator_of_the_sentence():
    missing, result = ("train", "test"), {"user": "packed", "item": ("tied", "small")}
    fault = Example("not_fitting", missing=missing, found=result)
    assert str(fault) == "train and test are missing; there is user: packed; item: tied; small."
    assert str(Example("not_fitting", missing=("a",), found={})) == "a are missing; there is none."


@pytest.mark.parametrize(
    ("code", "fields"),
    [
        ("unknown", {}),
        ("wrong_count", {"expected": 1}),
        ("wrong_count", {"expected": 1, "names": (), "got": 2, "more": 3}),
    ],
)
def test_unknown_code_or_other_fields_are_a_type_error(code, fields):
    with pytest.raises(TypeError):
        Example(code, **fields)


def test_copy_of_an_error_has_its_code_and_fields():
    """Pools of processes send errors to their parent by the same protocol as copies."""
    again = copy.copy(example())
    assert (type(again), again.code, again.fields) == (Example, "wrong_count", example().fields)


@pytest.mark.parametrize(
    ("sentence", "values", "text"),
    [
        ("{names}", ("a", "b"), "a, b"),
        ("x:{names:list}", ("a",), "x:\n- a"),
        ("x:{names:lines}", ("a",), "x: a"),
        ("x:{names:lines}", ("a", "b"), "x:\n- a\n- b"),
        ("{names:[]}", (2, 3), "[2, 3]"),
        ("{names:[]}", (), "[]"),
    ],
)
def test_sequences_are_written_in_a_line_or_one_line_each(sentence, values, text):
    kind = type("Listing", (CodedError,), {"sentences": {"some": sentence}})
    assert str(kind("some", names=values)) == text


@pytest.mark.parametrize("kind", BY_FIELDS, ids=lambda kind: kind.__name__)
def test_every_error_has_a_sentence_and_survives_a_copy(kind):
    for code in kind.sentences:
        error = example_of(kind, code)
        assert "{" not in str(error)
        again = copy.copy(error)
        assert (type(again), again.code, again.fields) == (kind, code, error.fields)


@pytest.mark.parametrize(
    "fault",
    [
        AuditFailed("graph_not_as_ordered", faults=("user: lost rows",)).caused_by("user"),
        ParityLost(ParityFailure(code="parity_nan", target="tensorrt", row=3)).caused_by("user"),
    ],
    ids=lambda fault: type(fault).__name__,
)
def test_copy_of_a_compression_error_has_the_units_that_are_its_cause(fault):
    copied = copy.deepcopy(fault)
    assert (type(copied), copied.code, copied.fields) == (type(fault), fault.code, fault.fields)
    assert copied.units == ("user",)
    assert str(copied) == str(fault)


def test_credentials_in_a_mapping_of_fields_are_removed_and_its_keys_stay(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-secret-value")
    result = {"user": "read from http://user:canary-secret-value@host", "item": "tied"}
    with pytest.raises(Example) as caught, clean_exceptions():
        raise Example("not_fitting", missing=("train",), found=result)
    assert caught.value.fields["found"].keys() == result.keys()
    assert "canary-secret-value" not in str(caught.value)
    assert "item: tied" in str(caught.value)


def test_credentials_in_fields_are_removed_and_the_class_and_code_stay(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-secret-value")
    with pytest.raises(Refused) as caught, clean_exceptions():
        raise PromotionRefused(
            "order_not_registered",
            order="a" * 64,
            model="m",
            registry="http://user:canary-secret-value@host",
        )
    assert isinstance(caught.value, PromotionRefused)
    assert caught.value.code == "order_not_registered"
    assert "canary-secret-value" not in str(caught.value)
    assert "canary-secret-value" not in str(caught.value.fields)


def test_credentials_are_removed_from_fields_that_the_sentence_cuts_off(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-secret-value")
    with raises_code(PromotionRefused, "order_not_registered") as caught, clean_exceptions():
        raise PromotionRefused(
            "order_not_registered", order="0" * 12 + "canary-secret-value", model="m", registry="r"
        )
    assert "canary-secret-value" not in str(caught.value.fields)


# --- values that documents and settings cannot have --------------------------------------------


def test_value_errors_are_created_with_a_literal_code_and_exactly_its_fields():
    assert [place for place, call in VALUE_ERRORS if not has_code_and_fields(call, SENTENCES)] == []


def test_every_code_of_a_value_error_is_created_somewhere():
    assert {call.args[0].value for _, call in VALUE_ERRORS} == set(SENTENCES)


def test_codes_of_value_errors_differ_from_each_other_and_from_those_of_pydantic():
    assert len(SENTENCES) == sum(map(len, SUBJECTS.values()))
    assert SENTENCES.keys().isdisjoint(get_args(ErrorType))


def test_sentences_of_value_errors_have_named_fields_and_none_called_sentence():
    for code, sentence in SENTENCES.items():
        names = field_names(sentence)
        assert all(name.isidentifier() for name in (code, *names)), code
        assert "sentence" not in names, code


def test_validators_raise_value_errors_with_a_code():
    """Sentences that are built in place have no code that a program could read."""
    built = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for name in PACKAGES
        for path in sorted((ROOT / name).rglob("*.py"))
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef)
        and any("_validator" in ast.unparse(item) for item in function.decorator_list)
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {"ValueError", "AssertionError"}
    ]
    assert built == []


class Unnamed(BaseModel):
    """A model whose validator refuses every name."""

    name: str

    @field_validator("name")
    @classmethod
    def _refuse(cls, name: str) -> str:
        raise value_error("tensor_type_unknown", tensor=name, dtype="int8", dtypes=["FP32"])


def test_pydantic_reports_the_code_the_fields_and_the_derived_sentence():
    with raises_value_error("tensor_type_unknown", tensor="x", dtypes=["FP32"]) as caught:
        Unnamed(name="x")
    (error,) = caught.value.errors()
    assert error["msg"] == "'x' is int8; Triton gets ['FP32']"
    assert error["ctx"]["sentence"] == error["msg"]


def test_value_that_looks_like_a_field_stays_as_it_is_in_the_sentence():
    """Pydantic replaces names in braces, also within values that it inserted before."""
    with raises_value_error("tensor_type_unknown") as caught:
        Unnamed(name="{dtype} {sentence}")
    assert caught.value.errors()[0]["msg"] == "'{dtype} {sentence}' is int8; Triton gets ['FP32']"


def test_surrogates_in_fields_are_written_as_escapes():
    """Python decodes bytes of arguments and file names that are not UTF-8 to surrogates."""
    error = value_error("path_not_unicode", path="a\udc80")
    assert str(error) == "'a\\udc80' is not valid Unicode"
    assert error.context == {"path": "a\\udc80", "sentence": str(error)}
    inner = value_error("path_in_subfolder", path="a\udc80")
    assert str(inner) == "a\\udc80 lies in a sub-folder; a bundle is flat"


@pytest.mark.parametrize(
    ("code", "fields"),
    [("unknown", {}), ("steps_with_preset", {}), ("steps_missing", {"preset": "safe"})],
)
def test_unknown_code_or_other_fields_of_a_value_error_are_a_type_error(code, fields):
    with pytest.raises(TypeError):
        value_error(code, **fields)
