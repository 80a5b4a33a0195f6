"""The command line: ``recpress --help``.

console.py        what is shown at a terminal
errors.py         messages and exit codes of failed commands
options.py        options that several commands have
orders.py         an order from options or a file
demo.py           the demo's order
promotion.py      ``recpress registry``
tables.py         ``recpress tables``
triton.py         ``recpress triton``
doctor_errors.py  what ``recpress doctor`` reports
doctor.py         ``recpress doctor``
app.py            all commands
"""
