"""What happens, in order. Typed parameters, no numerics, no I/O of their own.

terms.py     what somebody wants done, without the recipe's own types
order.py     the same with them: one pydantic model, the form in Prefect's UI
order_schema.py  the rules of an order that Prefect checks when it is submitted
resolve.py   what that means today: which bundle, which champion, done before?
compress.py  the way of one model through the tasks
cli.py       the command line; cli_promotion.py, cli_tables.py, ... are its groups
console.py   what a person at a terminal sees
demo.py      the demo's order
doctor.py    what this installation uses, and whether it answers
"""
