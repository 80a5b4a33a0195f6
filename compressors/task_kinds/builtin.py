"""All built-in kinds of tasks. What computes a loss or checks scores imports this file.

A declaration names its functions, which are imported when they are first used. The digest of a
task's sources follows import statements, so with this file it contains the functions.
"""

from compressors.task_kinds import ctr as ctr
from compressors.task_kinds import ranking as ranking
