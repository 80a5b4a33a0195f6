"""HTML pages that need no network and no script.

html.py      what all pages share
pictures.py  pictures as inline SVG
"""
