"""Import all built-in task kinds. Files that compute a loss or check scores import this file.

A ``TaskKind`` names its class as text, which is imported at first use. The key of a cached task
contains a digest of the source files that it imports, so it depends on these classes only because
of this file.
"""

from compressors.task_kinds import ctr as ctr
from compressors.task_kinds import ranking as ranking
from compressors.task_kinds import retrieval as retrieval
