"""Render results as tables, Markdown and HTML. No Prefect.

cells.py         formats metrics and changes as text
tables.py        the report as a table and as Markdown
stages.py        the effect of each step
measured.py      limits, quality and latency
plan_section.py  the recipe and the bytes of each table and layer
target_facts.py  facts about each target that was built
page.py          the report as one HTML page, from ``templates/``
"""
