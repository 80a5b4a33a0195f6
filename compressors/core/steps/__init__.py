"""What a step is: its protocol, its decisions, and code shared by several methods.

decisions.py          the decision about each unit, and the functions that select units
step.py               the protocol of a step, and what all methods declare
unit_settings.py      settings that many methods have
table_encoder.py      encode one table in blocks of rows
table_step.py         plan and apply the methods that encode tables
composition_steps.py  shared code of steps that build a table from smaller tables
"""
