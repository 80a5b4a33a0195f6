"""Errors of settings: variables, addresses, credentials, permissions.

``sentences`` of a class maps the code of each error to its message, with the fields in braces (see
``infra/errors/__init__.py``).

Fields whose names do not explain them:

- ``doing``: a verb such as ``read`` or ``write``. ``problem``: the message of another error.
- ``root``: the address of a store or Triton repository. ``setting``: the variable or option that
  contains it.
- ``place``: what the request refers to, such as a key. ``kind``: the class of the exception.
- ``remedy``: what to do, as a clause or as sentences.
"""

from typing import ClassVar

from infra.errors.base import Refused

_ROOT = "Give a folder, file:///folder or s3://bucket/prefix."
PREFECT_CREDENTIALS = (
    "Set PREFECT_API_AUTH_STRING to the PREFECT_SERVER_API_AUTH_STRING of your own server (after "
    "'make up-local' it is in client.env), or set PREFECT_API_KEY for Prefect Cloud."
)


class SettingRefused(Refused):
    """A setting is missing or unusable."""

    sentences: ClassVar = {
        "variable_invalid": "{name}: {problem}; got {got}.",
        "variable_missing": "{name} is not set: {remedy}.",
        # --- files and folders of this machine
        "folder_missing": "Could not {doing} {path}: {problem}. Create the folder, or name another "
        "one.",
        "path_forbidden": "Could not {doing} {path}: {problem}. Choose a folder where you may "
        "{doing} (RECPRESS_STORE, RECPRESS_HOME), or change its permissions.",
        "path_unusable": "Could not {doing} {path}: {problem}. Use a shorter path without links "
        "that form a loop.",
        "path_of_wrong_kind": "Could not {doing} {path}: {problem}. Move it away if it is "
        "a file in place of a folder, or a folder in place of a file.",
        "lock_not_writable": "{path} cannot be written: {problem}. Set RECPRESS_HOME to a folder "
        "you may write.",
        # --- the object store and the Triton repository
        "root_empty": f"{{setting}} {{root!r}} cannot be used: it is empty. {_ROOT}",
        "root_scheme_unknown": "{setting} {root!r} cannot be used: this scheme is not known. "
        f"{_ROOT}",
        "root_file_uri_form": "{setting} {root!r} cannot be used: a file URI has three slashes and "
        f"an absolute path. {_ROOT}",
        "root_bucket_invalid": "{setting} {root!r} cannot be used: a bucket's name has 3 to 63 "
        "letters, digits, dots, hyphens and underscores. "
        f"{_ROOT}",
        "root_prefix_invalid": "{setting} {root!r} cannot be used: the prefix must be names "
        "separated by single slashes, without '.', '..', backslashes and control characters. "
        f"{_ROOT}",
        "bucket_missing": "There is no bucket {bucket!r} at this endpoint. Create it, or correct "
        "RECPRESS_STORE or AWS_ENDPOINT_URL.",
        "bucket_not_creatable": "The bucket {bucket!r} cannot be created ({problem}). Check "
        "AWS_ENDPOINT_URL, and that AWS_ACCESS_KEY_ID may create buckets.",
        "store_credentials_refused": "The object store refused the credentials for {place} "
        "({problem}). Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE) to a key "
        "that may use bucket {bucket!r}. Check AWS_ENDPOINT_URL, and the clock of this machine, "
        "which signatures of requests contain.",
        "store_unusable": "The object store cannot be used for {place} ({problem}). Check "
        "AWS_ENDPOINT_URL, AWS_DEFAULT_REGION and the bucket's name.",
        "triton_repository_missing": "There is no Triton repository to work on. Set "
        "RECPRESS_TRITON or --to to a folder or s3://bucket/prefix.",
        "triton_repository_holds_store": "{setting} {repository} contains the object store "
        "{store}, and Triton would load every folder as a model. Give a folder or prefix that "
        "contains nothing else.",
        # --- the registry
        "registry_scheme_unknown": "MLFLOW_TRACKING_URI {scheme!r}... is not a registry. Give "
        "sqlite:///folder/registry.db, http(s)://server or a database URI.",
        "registry_address_malformed": "MLFLOW_TRACKING_URI is not a valid address. Percent-encode "
        "its password.",
        "registry_library_missing": 'The registry needs {module}. Run "pip install mlflow-skinny '
        "'sqlalchemy<2.1' alembic\" to install it.",
        "registry_driver_missing": "MLFLOW_TRACKING_URI needs a driver that is not installed: "
        "{problem}.",
        "registry_credentials_refused": "The registry refused the credentials: {problem}. Set "
        "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN.",
        "registry_version_differs": "The registry was created by another MLflow version: {problem}",
        "registry_database_unusable": "The database cannot be used as a registry: {problem}. Check "
        "MLFLOW_TRACKING_URI, or move the file away.",
        "registry_file_unusable": "{file} cannot be used as a registry: {problem}. Check "
        "MLFLOW_TRACKING_URI, or move the file away.",
        "registry_file_not_creatable": "The registry {file} cannot be created there: {problem}. "
        "Set RECPRESS_HOME to a folder you may write, or MLFLOW_TRACKING_URI.",
        "registry_file_not_writable": "The registry {file} cannot be opened for writing: "
        "{problem}. Check its permissions, or set MLFLOW_TRACKING_URI.",
        "registry_schema_unknown": "Expected a registry of the installed MLflow or an earlier one, "
        "got {file} with schema {schema!r}. Install the MLflow version that wrote it, or a later "
        "one.",
        "registry_incomplete": "The registry {file} is incomplete ({problem}). It contains "
        "{versions} registered version(s), so it is not changed. Restore it from a backup; or move "
        "it away "
        "and run 'recpress registry restore', which registers every result in the store again.",
        # --- Prefect
        "prefect_not_configured": "Expected a Prefect server, got none: PREFECT_API_URL is not set "
        "and PREFECT_SERVER_EPHEMERAL_ENABLED is false. Set one of them.",
        "prefect_credentials_missing": "Expected access to the Prefect server at {address}, got "
        f"HTTP {{status}} without credentials. {PREFECT_CREDENTIALS}",
        "prefect_credentials_refused": "Expected access to the Prefect server at {address}, got "
        f"HTTP {{status}} with the value of {{variable}}. {PREFECT_CREDENTIALS}",
        "prefect_not_listing": "Expected the Prefect server at {address} to list its work pools, "
        "got HTTP {status}. Set PREFECT_API_URL to the address of Prefect's API, which ends with "
        "/api, or unset it for the embedded server.",
        "prefect_answer_foreign": "Expected Prefect's API at {address}, got a response of another "
        "service ({problem}). Correct PREFECT_API_URL, or unset it for the embedded server.",
        # --- services that run as plain processes
        "services_running": "The local services in {folder} are already running. Stop them, or set "
        "another RECPRESS_HOME.",
        "services_form": "Expected services that can run as local processes in {path}, got the "
        "error {kind}: {problem}. Restore the file from the repository of recpress.",
        "health_check_form": "The health check of {service!r} must be a list that begins with CMD.",
        "duration_form": "Expected whole seconds such as 5s as a duration, got {got}.",
        "port_not_loopback": "The port {port!r} must be published on 127.0.0.1.",
        "port_taken": "Port {port} ({service}, {container_port} in its container) is in use. Stop "
        "the program that uses it, set PREFECT_PORT, MLFLOW_PORT or S3_PORT, or use --any-ports.",
        "programs_missing": "Not found: {programs}. {remedy}",
        "variables_line_form": "Expected NAME=value in {path}, line {line}. Correct it.",
        "variables_not_utf8": "Expected UTF-8 text in {path}, got {problem}. Correct it.",
        "postgres_user_missing": "Postgres refuses to run as root, and none of the users {users} "
        "exists to run it. Run this command as another user.",
        "postgres_folder_unreachable": "Postgres runs as user {user} and cannot reach {folder}. "
        "Set RECPRESS_HOME to a folder whose parents every user may enter, such as one in "
        "/var/lib.",
    }
