"""Reasons of decisions: each is a code and fields, from which its sentence is formatted.

Each file except ``reason.py`` maps the codes of one subject to sentences with fields in braces.

reason.py     the class ``Reason``: format several reasons, and read them from JSON
selection.py  sentences about units that a step selects or skips, and about whole steps
recipe.py     sentences about steps that a flow leaves out, and about the quality budget
tables.py     sentences about embedding tables
dense.py      sentences about formats of dense layers
pruning.py    sentences about channels, weights and layers that are removed
rewriting.py  sentences about norms and factors that move between layers
training.py   sentences about training
bundles.py    sentences about files of a bundle, packed or not (a draft), and its model.json
baseline.py   sentences about the labels of a bundle and the scores of its model
limits.py     sentences about limits that are likely mistakes, and metrics that are not measured
verdicts.py   sentences about judged limits and targets
"""

from compressors.contracts.reasons.reason import SENTENCES as SENTENCES
from compressors.contracts.reasons.reason import SUBJECTS as SUBJECTS
from compressors.contracts.reasons.reason import Reason as Reason
from compressors.contracts.reasons.reason import join_reasons as join_reasons
from compressors.contracts.reasons.reason import read_reasons as read_reasons
