"""Error codes: every raise has a code of its class and its fields, and every code is documented."""

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

FIELD_CLASSES = [error_class for error_class in coded_classes() if error_class is not ParityLost]
"""Classes whose constructor takes a code and fields; ``ParityLost`` takes a ``ParityFailure``."""
CLASSES = {error_class.__name__: error_class for error_class in coded_classes()}
ERROR_OF_FAILURE = {"ParityFailure": "ParityLost"}
"""Error class by the class of its constructor's argument, which has the code."""


ERROR_CALLS = calls_of(CLASSES.keys() - set(ERROR_OF_FAILURE.values()))
FAILURE_CALLS = calls_of(ERROR_OF_FAILURE.keys())
VALUE_ERROR_CALLS = calls_of({"value_error"})


def test_base_classes_without_codes_are_never_raised():
    """They are used only in ``except`` clauses."""
    roots = {error_class.__name__ for error_class in (InfraError, Refused)}
    assert calls_of(roots) == []


def test_each_raised_error_has_a_code_of_its_class_and_exactly_its_fields():
    wrong = [
        position
        for position, call in ERROR_CALLS
        if not has_code_and_fields(call, CLASSES[call.func.id].sentences)
    ]
    assert wrong == []


def test_every_code_is_raised_somewhere():
    used = {(call.func.id, call.args[0].value) for _, call in ERROR_CALLS}
    for _, call in FAILURE_CALLS:
        (code,) = (keyword.value.value for keyword in call.keywords if keyword.arg == "code")
        used.add((ERROR_OF_FAILURE[call.func.id], code))
    defined = {
        (name, code) for name, error_class in CLASSES.items() for code in error_class.sentences
    }
    assert used == defined


def test_classes_with_codes_are_in_the_documented_modules():
    def subclasses(error_class: type) -> set[type]:
        return {error_class} | {
            descendant
            for subclass in error_class.__subclasses__()
            for descendant in subclasses(subclass)
        }

    for package in (
        "compressors.errors.compression",
        "infra.errors",
        "flows.cli.errors",
        "tasks.orchestration.documents",
    ):
        importlib.import_module(package)
    ours = {
        error_class
        for error_class in subclasses(CodedError)
        if error_class.__module__.split(".")[0] in PACKAGES
    }
    undocumented = {
        error_class
        for error_class in ours
        if error_class.__module__ not in (*MODULES, CodedError.__module__)
    }
    assert undocumented == set()


def test_error_page_in_the_docs_is_up_to_date():
    assert TABLE.read_text() == page(), "run python -m tests.error_codes"


@pytest.mark.parametrize(
    "error_class", coded_classes(), ids=lambda error_class: error_class.__name__
)
def test_sentences_end_with_a_full_stop_and_have_named_fields(error_class):
    for code, sentence in error_class.sentences.items():
        assert code.isidentifier(), code
        assert sentence.endswith((".", "}")), code
        assert all(name.isidentifier() for name in field_names(sentence)), code


# --- the base class --------------------------------------------------------------------------


class Example(CodedError):
    """An example; the text after the colon of a field separates the items of a list."""

    sentences: ClassVar = {
        "wrong_count": "Expected {expected:,} of {names}, got {got!r}. Count again.",
        "not_fitting": "{missing: and } are missing; there is {found:; }.",
    }


def example() -> Example:
    """Return an error with all kinds of fields."""
    return Example("wrong_count", expected=1000, names=("a", "b"), got="x")


def test_sentence_is_derived_from_the_fields_of_an_error():
    assert str(example()) == "Expected 1,000 of a, b, got 'x'. Count again."
    assert example().fields == {"expected": 1000, "names": ("a", "b"), "got": "x"}


def test_lists_and_mappings_are_written_with_the_separator_of_the_sentence():
    missing, by_unit = ("train", "test"), {"user": "packed", "item": ("tied", "small")}
    fault = Example("not_fitting", missing=missing, found=by_unit)
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
def test_unknown_code_or_other_fields_of_an_error_raise_a_type_error(code, fields):
    with pytest.raises(TypeError):
        Example(code, **fields)


def test_copy_of_an_error_has_its_code_and_fields():
    """Process pools send errors to the parent process with the same protocol as copies."""
    copied = copy.copy(example())
    assert (type(copied), copied.code, copied.fields) == (Example, "wrong_count", example().fields)


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
    error_class = type("Listing", (CodedError,), {"sentences": {"some": sentence}})
    assert str(error_class("some", names=values)) == text


@pytest.mark.parametrize("error_class", FIELD_CLASSES, ids=lambda error_class: error_class.__name__)
def test_every_error_has_a_sentence_and_can_be_copied(error_class):
    for code in error_class.sentences:
        error = example_of(error_class, code)
        assert "{" not in str(error)
        copied = copy.copy(error)
        assert (type(copied), copied.code, copied.fields) == (error_class, code, error.fields)


@pytest.mark.parametrize(
    "fault",
    [
        AuditFailed("graph_not_as_ordered", faults=("user: lost rows",)).name_cause("user"),
        ParityLost(ParityFailure(code="parity_nan", target="tensorrt", row=3)).name_cause("user"),
    ],
    ids=lambda fault: type(fault).__name__,
)
def test_copy_of_a_compression_error_has_the_units_that_are_its_cause(fault):
    copied = copy.deepcopy(fault)
    assert (type(copied), copied.code, copied.fields) == (type(fault), fault.code, fault.fields)
    assert copied.units == ("user",)
    assert str(copied) == str(fault)


def test_credentials_in_a_mapping_field_are_removed_and_its_keys_are_kept(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-secret-value")
    by_unit = {"user": "read from http://user:canary-secret-value@host", "item": "tied"}
    with pytest.raises(Example) as caught, clean_exceptions():
        raise Example("not_fitting", missing=("train",), found=by_unit)
    assert caught.value.fields["found"].keys() == by_unit.keys()
    assert "canary-secret-value" not in str(caught.value)
    assert "item: tied" in str(caught.value)


def test_credentials_in_fields_are_removed_and_class_and_code_are_kept(monkeypatch):
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
    assert [
        position for position, call in VALUE_ERROR_CALLS if not has_code_and_fields(call, SENTENCES)
    ] == []


def test_every_code_of_a_value_error_is_created_somewhere():
    assert {call.args[0].value for _, call in VALUE_ERROR_CALLS} == set(SENTENCES)


def test_codes_of_value_errors_differ_from_each_other_and_from_codes_of_pydantic():
    assert len(SENTENCES) == sum(map(len, SUBJECTS.values()))
    assert SENTENCES.keys().isdisjoint(get_args(ErrorType))


def test_sentences_of_value_errors_have_named_fields_and_none_called_sentence():
    for code, sentence in SENTENCES.items():
        names = field_names(sentence)
        assert all(name.isidentifier() for name in (code, *names)), code
        assert "sentence" not in names, code


def test_validators_raise_value_errors_with_a_code():
    """A ``ValueError`` with a sentence has no code that a program could check."""
    uncoded = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for name in PACKAGES
        for path in sorted((ROOT / name).rglob("*.py"))
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef)
        and any("_validator" in ast.unparse(item) for item in function.decorator_list)
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {"ValueError", "AssertionError"}
    ]
    assert uncoded == []


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
    assert error["msg"] == "'x' has type int8; Triton supports ['FP32']"
    assert error["ctx"]["sentence"] == error["msg"]


def test_a_value_with_braces_is_unchanged_in_the_sentence():
    """Pydantic replaces names in braces, also in values that it has already inserted."""
    with raises_value_error("tensor_type_unknown") as caught:
        Unnamed(name="{dtype} {sentence}")
    assert (
        caught.value.errors()[0]["msg"]
        == "'{dtype} {sentence}' has type int8; Triton supports ['FP32']"
    )


def test_surrogates_in_fields_are_written_as_escapes():
    """Python decodes bytes of arguments and file names that are not UTF-8 to surrogates."""
    error = value_error("path_not_unicode", path="a\udc80")
    assert str(error) == "expected a path that UTF-8 can encode, got 'a\\udc80'"
    assert error.context == {"path": "a\\udc80", "sentence": str(error)}
    inner = value_error("path_in_subfolder", path="a\udc80")
    assert (
        str(inner)
        == "a\\udc80 is in a subfolder, but a bundle has none; move the file to the top folder"
    )


@pytest.mark.parametrize(
    ("code", "fields"),
    [("unknown", {}), ("steps_with_preset", {}), ("steps_missing", {"preset": "safe"})],
)
def test_unknown_code_or_other_fields_of_a_value_error_raise_a_type_error(code, fields):
    with pytest.raises(TypeError):
        value_error(code, **fields)
