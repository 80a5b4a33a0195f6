"""HTML pages that need no network and no script.

html.py      renders a template; those of all pages are in ``templates/``
pictures.py  pictures as inline SVG
"""
