"""Backward compatibility: stored orders, steps and limits are read with all of their values.

A renamed setting, kind or choice needs an alias for the old name, because order files of users and
stored reports contain it.
"""

import json
from collections import Counter
from typing import Any

import pytest

from compressors.contracts import Limit
from flows.cli.orders import read_order
from flows.order import Order
from tests.stored_home.orders import ORDERS
from tests.stored_home.settings import STEP, registered_steps
from tests.stored_home.stored import EXPECTED, WITH_ORDERS, load_fixture

STEPS = [document for expected in EXPECTED.values() for document in expected["steps"]]
RECIPES = [
    (name, recipe["steps"])
    for expected in EXPECTED.values()
    for name, recipe in expected["recipes"].items()
]
LIMITS = [document for expected in EXPECTED.values() for document in expected["limits"]]
ORDER_DOCUMENTS = [document for expected in EXPECTED.values() for document in expected["orders"]]
RENAMED_CHOICES = {("importance", "traffic"): "lookups"}
"""Current choice by setting and stored choice."""


def values(document: Any) -> Counter[str]:
    """Count every value in a document, except those of ``kind`` fields; choices by current name."""
    if isinstance(document, dict):
        current = {
            key: RENAMED_CHOICES.get((key, value), value) if isinstance(value, str) else value
            for key, value in document.items()
            if key != "kind"
        }
        return sum(map(values, current.values()), Counter())
    if isinstance(document, list):
        return sum((values(item) for item in document), Counter())
    return Counter([json.dumps(document)])


def require_values(document: Any, loaded: Any) -> None:
    """Require that ``loaded`` has every stored value; it may have more."""
    missing = values(document) - values(loaded)
    assert not missing


def test_every_registered_step_is_in_the_stored_documents():
    stored = {document["kind"] for document in STEPS}
    assert {step().kind for step in registered_steps()} - stored == set()
    assert len(STEPS) > len(registered_steps())


@pytest.mark.parametrize("document", STEPS, ids=lambda document: document["kind"])
def test_a_stored_step_is_read_with_all_of_its_values(document: dict[str, Any]):
    step = STEP.validate_json(json.dumps(document))
    require_values(document, step.model_dump(mode="json"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe[0])
def test_the_steps_of_a_stored_recipe_are_read(recipe: tuple[str, list[dict[str, Any]]]):
    for document in recipe[1]:
        require_values(document, STEP.validate_python(document).model_dump(mode="json"))


@pytest.mark.parametrize("document", LIMITS, ids=lambda document: document["metric"])
def test_a_stored_limit_is_read_and_written_as_text(document: dict[str, Any]):
    limit = Limit.model_validate(document)
    require_values(document, limit.model_dump(mode="json"))
    assert Limit.parse(str(limit)) == limit


@pytest.mark.parametrize("document", ORDER_DOCUMENTS, ids=lambda document: document["preset"])
def test_a_stored_order_is_read_with_all_of_its_values(document: dict[str, Any]):
    order = Order.model_validate_json(json.dumps(document))
    require_values(document, order.model_dump(mode="json"))


@pytest.mark.parametrize("name", WITH_ORDERS)
def test_stored_order_files_equal_the_orders_in_stored_reports(name: str):
    files = {path.stem: path for path in (load_fixture(name).root / "orders").iterdir()}
    assert files.keys() == ORDERS.keys()
    orders = {stem: read_order(path) for stem, path in files.items()}
    expected = EXPECTED[name]
    for stem, order in orders.items():
        finished = expected["finished"][stem]
        report = expected["registry"]["show"][f"{finished['model']}@{finished['version']}"]
        stored_order = Order.model_validate(report["reproduction"]["order"])
        # The report omits settings that do not affect the result, and resolves bundle and teachers.
        unreported = {
            "model": stored_order.model,
            "teachers": stored_order.teachers,
            "promote": False,
            "attempt": 0,
        }
        assert order.model_copy(update=unreported) == stored_order
