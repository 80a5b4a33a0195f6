"""The command line: ``recpress --help``.

console.py        terminal output: lines, tables, progress and results
errors.py         messages and exit codes of failed commands
options.py        options that several commands share
orders.py         builds an order from options or a file
demo.py           the order of ``recpress demo``
new.py            ``recpress new``
promotion.py      ``recpress registry promote``, ``rollback``, ``restore``
tables.py         ``recpress tables``
triton.py         ``recpress triton``
doctor_errors.py  errors of ``recpress doctor``
doctor.py         ``recpress doctor``
app.py            the entry point, and all other commands
"""
