"""Prefect flows: which tasks an order runs, and in which sequence. No numerics, no I/O.

terms.py            the fields of an order that need no tensor library
order.py            the complete order: parameter of the flow, and form in Prefect's UI
presets.py          the named recipes
order_schema.py     the rules that Prefect checks when an order is submitted
order_faults.py     formats validation errors of an order as sentences
resolve.py          finds an order's bundle, champions and teachers, and an earlier result
step_selection.py   selects the steps of a recipe that fit the model, its data and the budget
memory.py           checks whether an order fits in the available memory
dry_run.py          predicts the steps and bytes of a recipe from shapes, without data
explain.py          describes the expected result of an order without running it
run.py              the run context of one order, through which its phases call tasks
recipe.py           applies the steps of a recipe within the budget
phases.py           the phases of an order: pull, validate, compress, build, measure, judge, publish
compress.py         the flow: runs all phases for one model
server/             selects or starts the Prefect server that a command uses
cli/                the command line
"""

from infra.telemetry import disable_telemetry

disable_telemetry()
