"""Import all built-in task kinds. Files that compute a loss or check scores import this file.

The cache key of a task contains a digest of the source files that it imports, which are found from
import statements. The functions of a task kind are imported at run time from a string
(``TaskKind.functions``). Without the import statements here, a change of their sources would not
change the cache key.
"""

# ``as`` marks an import as intended for linters, which otherwise report it as unused.
from compressors.task_kinds import ctr as ctr
from compressors.task_kinds import ranking as ranking
from compressors.task_kinds import retrieval as retrieval
