"""Teachers: the first difference of a teacher's outputs from the student's is reported."""

import pytest
from signatures import replace_output

from compressors.contracts import IdInput, Output, Signature
from tasks.bundles.teachers import output_difference

ITEM = IdInput(name="item", table="items", dtype="int64", out_of_range="clamp")
USER = IdInput(name="user", table="users", dtype="int64", out_of_range="clamp")
STUDENT = Signature(
    inputs=(USER, ITEM),
    outputs=(Output(name="label", kind="ctr", form="logit", label="label", metric="auc"),),
)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, None),
        ({"name": "other", "label": "other"}, None),  # names of a single output need not agree
        ({"form": "probability"}, None),  # probabilities are converted to logits
        ({"inputs": (ITEM,)}, None),  # a teacher may read other inputs
        (
            {"kind": "ranking", "form": "score"},
            "its task is 'ranking', not 'ctr'",
        ),
    ],
)
def test_output_difference_is_another_task(changed, expected):
    inputs = changed.get("inputs", STUDENT.inputs)
    output = {name: value for name, value in changed.items() if name != "inputs"}
    teacher = replace_output(STUDENT, **output).model_copy(update={"inputs": inputs})
    assert output_difference(teacher, STUDENT) == expected


def test_teacher_with_another_number_of_outputs_is_described():
    teacher = STUDENT.model_construct(outputs=STUDENT.outputs * 2, inputs=STUDENT.inputs)
    assert output_difference(teacher, STUDENT) == "it has 2 outputs, not 1"
