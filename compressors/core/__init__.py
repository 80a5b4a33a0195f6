"""The framework that runs every compression step, and the modules and data types steps share.

modules/              the modules that hold compressed tensors
units.py              the tables and dense layers of a network
model.py              a network with its class, description and plan
batches.py            prepared data as batches of model inputs
scores.py             call a network, and convert its outputs to columns of scores
random_inputs.py      random inputs of a model, valid or out of range
placement.py          move a network to another device for the time of a pass
placeholders.py       tensors with a shape and no values, for dry runs
state/                convert a module to tensors and records, and build it from them
steps/                what a step is, and what many methods share
plan_lines.py         the plan after a step
outcomes.py           compare the decisions of a step's plan with its result
runner.py             run a step and check its contract
skipping.py           run a step and skip the units that do not support it
dry_run.py            predict formats, shapes and bytes of a step's result
smoke_test.py         check that a network runs on one batch and gives finite, repeatable scores
registries.py         the list of all methods, formats, and tables built from smaller tables
"""
