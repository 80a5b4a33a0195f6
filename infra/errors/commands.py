"""Errors of commands: options, orders and files that cannot be used.

``sentences`` of a class maps the code of each error to its message, with the fields in braces (see
``infra/errors/__init__.py``).

``problem`` is the message of another error, and ``got`` the text that the user wrote.
"""

from typing import ClassVar

from infra.errors.base import Refused


class CommandRefused(Refused):
    """The options of a command, or the order in a file, cannot be used."""

    sentences: ClassVar = {
        "model_missing": "Name a model: recpress compress NAME --limit 'auc vs baseline >= "
        "-0.002'.",
        "from_needs_model": "--from {source} needs the folder of the model as --model, and no "
        "--sentence-transformer.",
        "order_and_options": "Give either --order FILE or a model with options, not both.",
        "order_unreadable": "{path} cannot be read: {problem}. Name a readable file.",
        "order_not_utf8": "{path} cannot be read as UTF-8 text: {problem}.",
        "order_unusable": "{path} cannot be used as an order: {problem}.",
        "order_invalid": "{path} is not a valid order:{problems:list}",
        "limit_missing": "An order needs at least one limit to judge its result. Add one: --limit "
        "'auc vs baseline >= -0.002'.",
        "limit_invalid": "--limit: {problem}",
        "limit_unreadable": "{problem}",
        "target_unknown": "Target {target!r} is not among {targets}.",
        "setting_form": "Expected --set NAME=VALUE, such as --set scale=float32, got {got!r}.",
        "pair_form": "Expected {option} KEY=VALUE, got {got!r}.",
        "pair_repeated": "Expected each key of {option} once, got {key!r} twice.",
        "setting_unknown": "{method} has no setting {setting!r}; it has {settings}.",
        "table_format_unknown": "There is no table format {format!r}; there are {formats}.",
        "tables_missing": "{path} does not exist. Name a safetensors file, or a folder of shards.",
        "method_needs_model": "{method} needs a whole model. Methods that compress tables without "
        "a model are {methods}.",
        "examples_missing": "The demo trains the model in examples/, which is in the repository "
        "and not in the installed package. Clone the repository and run 'make demo' there.",
    }
