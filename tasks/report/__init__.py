"""Render the report of an order as tables, Markdown and HTML. No Prefect.

cells.py         formats metrics, changes and reasons as text
tables.py        renders the report as a table and as Markdown
stages.py        renders the effect of each step
measured.py      renders limits, quality and latency for the page
plan_section.py  renders the recipe and the bytes of each table and layer for the page
target_facts.py  renders facts about each built target for the page
page.py          renders the report as one HTML page, from ``templates/``
"""
