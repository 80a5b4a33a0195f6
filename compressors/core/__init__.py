"""What every step needs, and the one place that runs steps.

modules/              the modules that hold compressed tensors
units.py              the tables and dense layers of a network
model.py              a network with its signature, plan and statistics
batches.py            prepared data as batches of model inputs
placement.py          a network on another device for the time of a pass
placeholders.py       tensors with a shape and no values, for dry runs
state/                a module as tensors and records, and back
step.py               the protocols that a step implements
step_settings.py      settings that many steps have
runner.py             runs a step and checks its contract
skipping.py           runs a step without the units that do not support it
plan_lines.py         the plan after a step
composition_steps.py  what all steps share that make a table of smaller tables
dry_run.py            formats, shapes and bytes of a step's result, without the work
smoke_test.py         one batch through a network, from stored tensors to served scores
registries.py         the list of all methods, formats and compositions
"""
