"""Select or start the Prefect server of a run.

prefect_access.py   selects and checks the server of a command
embedded_server.py  the server of one command, if no other is configured
"""
