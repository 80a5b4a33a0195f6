"""Import all built-in task kinds. Files that compute a loss or check scores import this file.

A declaration names its class as text, which is imported at first use. The digest of a task's
sources follows import statements, so it contains these classes only because of this file.
"""

from compressors.task_kinds import ctr as ctr
from compressors.task_kinds import ranking as ranking
