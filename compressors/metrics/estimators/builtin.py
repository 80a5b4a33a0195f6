"""Import all built-in estimators. Code that evaluates a metric imports this file.

A metric's declaration names its estimator, which is imported only at its first use. The cache key
of a task contains a digest of the source files that it imports, so it depends on the estimators
only because of this file.
"""

from compressors.metrics.estimators import auc as auc
from compressors.metrics.estimators import log_loss as log_loss
from compressors.metrics.estimators import ndcg as ndcg
from compressors.metrics.estimators import recall as recall
from compressors.metrics.estimators import top_k as top_k
