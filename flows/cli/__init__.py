"""The command line: ``recpress --help``.

console.py        terminal output
errors.py         messages and exit codes of failed commands
options.py        options that several commands have
orders.py         an order from options or a file
demo.py           the demo's order
promotion.py      ``recpress registry``
tables.py         ``recpress tables``
triton.py         ``recpress triton``
doctor_errors.py  errors of ``recpress doctor``
doctor.py         ``recpress doctor``
app.py            all commands
"""
