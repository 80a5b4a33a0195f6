"""What happens, in order. Typed parameters, no numerics, no I/O of their own.

order.py     what somebody wants done: one pydantic model, the form in Prefect's UI
compress.py  the way of one model through the tasks
cli.py       the command line
"""
