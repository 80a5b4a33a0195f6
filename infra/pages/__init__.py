"""HTML pages that need no network and no script.

html.py      renders templates; ``templates/`` has the shared ones and the validation page
pictures.py  charts as inline SVG
"""
