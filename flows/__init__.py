"""What happens, in order. Typed parameters, no numerics, no I/O of their own.

terms.py            what an order asks for, without the recipe's own types
order.py            the same with them: one pydantic model, the form in Prefect's UI
order_schema.py     the rules of an order that Prefect checks when it is submitted
resolve.py          what that means today: which bundle, which champion, done before?
memory.py           whether an order fits in the memory that is available
compress.py         the way of one model through the tasks
cli.py              the command line; cli_promotion.py, cli_tables.py, ... are its groups
cli_errors.py       what it prints, and its exit code, when a command fails
console.py          what is shown at a terminal
prefect_access.py   which Prefect server a command uses
embedded_server.py  the server of one command, and its process
demo.py             the demo's order
doctor.py           what this installation uses, and whether it answers
"""

from infra.telemetry import disable_telemetry

disable_telemetry()  # before any module here imports Prefect
