"""What happens, in order. No numerics, no I/O.

terms.py            an order without its recipe
order.py            an order: the parameter of the flow and the form in Prefect's UI
presets.py          the named recipes
order_schema.py     the rules that Prefect checks when an order is submitted
order_faults.py     what is wrong with an order, as sentences
resolve.py          the bundle, champion and digest of an order
choosing.py         which steps of a recipe are applied
memory.py           whether an order fits in the available memory
dry_run.py          the steps and bytes of a recipe, from shapes alone
explain.py          what an order would run
run.py              one order that is being carried out, and how its stages call tasks
recipe.py           the steps of a recipe, within the budget
stages.py           the stages of an order: pull, validate, compress, build, measure, judge, publish
compress.py         one model through all stages
server/             which Prefect server a run reports to
cli/                the command line
"""

from infra.telemetry import disable_telemetry

disable_telemetry()
