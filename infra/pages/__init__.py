"""HTML pages that need no network and no script.

html.py      renders templates; the layout that all pages share is in ``templates/``
pictures.py  charts as inline SVG
"""
