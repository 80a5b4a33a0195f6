"""Import all built-in task kinds. Files that compute a loss or check scores import this file.

A task kind is a kind of model output. It names its functions by a string (``TaskKind.functions``)
that is imported at run time. The cache key of a Prefect task contains a digest of the source files
that the task imports, which are found from import statements. Without those here, a change of a
task kind's functions would not change the cache key.
"""

# ``as`` marks an import as intended for linters, which otherwise report it as unused.
from compressors.task_kinds import ctr as ctr
from compressors.task_kinds import ranking as ranking
from compressors.task_kinds import retrieval as retrieval
