"""Results as tables, Markdown and HTML. No Prefect.

cells.py         metrics and changes as text
tables.py        the report as a table and as Markdown
stages.py        what each step contributes
measured.py      limits, quality and latency
plan_section.py  the recipe and the bytes of each table and layer
target_facts.py  what was built for each target
page.py          the report as one HTML page, from ``templates/``
"""
