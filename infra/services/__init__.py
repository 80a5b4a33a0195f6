"""The services of docker-compose.yml (Prefect, MLflow, Postgres, S3, worker), also without Docker.

http_probe.py      one HTTP request with a total deadline
postgres.py        creates a Postgres cluster as the official image does
compose.py         converts docker-compose.yml to descriptions of local processes
local_services.py  starts, restarts and stops those processes
setup.py           creates buckets, work pools, deployments and automations
"""
