"""Prefect flows: the sequence of tasks of an order. No numerics, no I/O.

terms.py            an order without its recipe
order.py            an order: the parameter of the flow and the form in Prefect's UI
presets.py          the named recipes
order_schema.py     the rules that Prefect checks when an order is submitted
order_faults.py     formats the faults of an order as sentences
resolve.py          resolves the bundle, champion and digest of an order
choosing.py         selects the steps of a recipe that are applied
memory.py           checks whether an order fits in the available memory
dry_run.py          the steps and bytes of a recipe, from shapes alone
explain.py          describes the result of an order without running it
run.py              the run context of one order, through which its stages call tasks
recipe.py           applies the steps of a recipe within the budget
stages.py           the stages of an order: pull, validate, compress, build, measure, judge, publish
compress.py         one model through all stages
server/             selects or starts the Prefect server of a run
cli/                the command line
"""

from infra.telemetry import disable_telemetry

disable_telemetry()
