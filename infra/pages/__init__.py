"""HTML pages that need no network and no script.

html.py      renders the templates of ``templates/`` and of ``tasks/report/templates/``
pictures.py  charts as inline SVG
"""
