"""Errors about orders whose parts do not fit together.

An order is a request to compress a model by a list of steps or a preset (a named list of steps). A
budget is the quality that the result may lose.

``sentences`` map a code to its message, in the syntax of ``str.format``.
"""

from typing import ClassVar

from compressors.errors.compression import CompressionError


class OrderRefused(CompressionError):
    """The steps, teachers, budget or targets of an order do not fit the model or each other."""

    sentences: ClassVar = {
        "budget_needs_validation": "A budget is measured on validation data; this model has "
        "{splits}. Add it to model.json and pack again, or leave the budget out.",
        "step_not_applicable": "{reason}",  # a ``Reason`` of ``contracts/reasons``
        "no_step_fits": "No step of preset {preset!r} fits this model: {reasons:; }",
        "no_target_built": "None of the optional targets could be built: {reasons:; }",
        "teachers_unused": (
            "The order names {teachers} teacher(s), but none of its steps uses teachers: "
            "{steps}. Add a step such as 'distill', or leave 'teachers' out."
        ),
        "teacher_repeated": (
            "Teacher {reference!r} is {name}, which is a teacher already. Name each teacher once, "
            "and do not name the model that is compressed: it is always a teacher."
        ),
        "teacher_reference_malformed": "Teacher {reference!r} is not of the form "
        "'registry:name@version', such as 'registry:clicks@3' or 'registry:clicks@@champion'.",
        "teacher_outputs_differ": (
            "Teacher {reference!r} has other outputs: {difference}. Teachers must have the "
            "outputs of the model."
        ),
        "teacher_form_differs": (
            "Teacher {reference!r} gives values of form {form!r}, which cannot be converted to "
            "the model's {expected!r}. Only logits and probabilities can be converted."
        ),
        "teacher_column_malformed": (
            "Teacher {reference!r} is not of the form 'column:NAME' or 'column:NAME=FORM', with "
            "FORM logit, probability or score."
        ),
        "teacher_columns_count": (
            "Teacher {reference!r} must name a column for each of the outputs {outputs}, separated "
            "by commas."
        ),
        "teacher_column_without_data": (
            "Teacher {reference!r} names a column of the training data, but the bundle has none. "
            "Add train data to model.json and pack again."
        ),
    }
