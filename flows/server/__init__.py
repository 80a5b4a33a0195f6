"""The Prefect server that a command uses: the configured one, or one that the command starts.

prefect_access.py   checks the configured server, or starts an embedded one
embedded_server.py  a Prefect server that runs as long as one command
"""
