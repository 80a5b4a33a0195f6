"""HTML pages that need no network and no script.

html.py      renders templates; shared ones and the validation page are in ``templates/``
pictures.py  charts as inline SVG
"""
