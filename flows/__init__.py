"""What happens, in order. Typed parameters, no numerics, no I/O of their own.

terms.py     what somebody wants done, without the recipe's own types
order.py     the same with them: one pydantic model, the form in Prefect's UI
resolve.py   what that means today: which bundle, which champion, done before?
memory.py    whether an order fits in the memory that is available
compress.py  the way of one model through the tasks
cli.py       the command line; cli_promotion.py, cli_tables.py, ... are its groups
cli_errors.py  what it prints, and its exit code, when a command fails
console.py   what a person at a terminal sees
demo.py      the demo's order
doctor.py    what this installation uses, and whether it answers
"""
