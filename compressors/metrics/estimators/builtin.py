"""All built-in estimators. What evaluates a metric imports this file.

A declaration names its estimator, which is imported when it is first used. The digest of a task's
sources follows import statements, so with this file it contains the estimators.
"""

from compressors.metrics.estimators import auc as auc
from compressors.metrics.estimators import log_loss as log_loss
from compressors.metrics.estimators import ndcg as ndcg
from compressors.metrics.estimators import recall as recall
