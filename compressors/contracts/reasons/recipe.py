"""Reasons why a flow leaves a step out of a recipe, and results of the quality budget.

``SENTENCES`` maps the code of a reason to its sentence, in the syntax of ``str.format``.
``Reason`` in ``reason.py`` fills in the fields in braces.

A preset may list several options, each a group of steps, such as 4 bits and then 8 bits. The flow
keeps the first option that can be applied and is within the budget. A field ``fault`` is the
message of an error. A field ``origin`` says who set the budget: ``budget_ordered`` (the order) or
``budget_of_preset``.
"""

SENTENCES = {
    "option_not_needed": "an earlier option is within the budget",
    "nothing_left": "earlier steps left no unit for it",
    "over_budget": (
        "the model would have lost {loss:.5f} of {metric} on validation rows, more "
        "than the budget {budget:g}"
    ),
    "not_within_budget": "not within the budget",
    "not_applicable": "{fault}",
    "pruning_not_judged": (
        "rows are pruned only if validation data can measure the loss of quality; this "
        "model has {splits} data. Add validation data to model.json and pack again"
    ),
    "no_loss": "{step!r} cannot train a model of task {task!r}. Leave the step out",
    "data_missing": "{step!r} needs {missing: and } data; this model has {splits}. Add it to "
    "model.json and pack again, or leave the step out",
    "budget_ordered": "as ordered",
    "budget_of_preset": "the default of preset {preset!r}",
    "quality_lost": "Quality budget: {budget:g} of {metric} on validation rows ({origin}); the "
    "result lost {loss:.5f} there",
    "quality_gained": "Quality budget: {budget:g} of {metric} on validation rows ({origin}); the "
    "result gained {gain:.5f} there",
    "quality_over_budget": (
        "Quality budget: {budget:g} of {metric} on validation rows ({origin}); the "
        "result lost {loss:.5f} there, which is over the budget: the steps that preset "
        "'fast' also contains are not checked against it"
    ),
    "earlier_preset_smaller": "Preset {preset!r} gave {bytes:,} bytes of weights and preset "
    "{earlier!r} gives {earlier_bytes:,}: this is the result of {earlier!r}",
}
