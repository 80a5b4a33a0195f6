"""The services of docker-compose.yml.

http_probe.py      one HTTP request with a total deadline
postgres.py        a Postgres cluster as its image creates it
compose.py         docker-compose.yml, read as plain processes
local_services.py  those processes, started, watched and stopped
setup.py           buckets, work pools, deployments and automations
"""
