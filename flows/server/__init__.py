"""Which Prefect server a run reports to.

prefect_access.py   which server a command uses
embedded_server.py  the server of one command, if no other is configured
"""
