"""The services of docker-compose.yml.

http_probe.py      one HTTP request with a total deadline
postgres.py        creates a Postgres cluster as the official image does
compose.py         reads docker-compose.yml as local processes
local_services.py  starts, watches and stops those processes
setup.py           creates buckets, work pools, deployments and automations
"""
