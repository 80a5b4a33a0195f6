"""Errors about values in documents, orders and settings: each has a code, fields and a sentence.

coded.py      the function ``value_error``, which creates an error that pydantic reports
signature.py  sentences about the inputs and the signature of a model
limits.py     sentences about limits and measured numbers
steps.py      sentences about settings of steps
orders.py     sentences about orders and their data rules
bundles.py    sentences about paths and JSON of bundles
storage.py    sentences about stored artifacts and ``RECPRESS_HOME``
serving.py    sentences about engine profiles and Triton models
"""

from compressors.contracts.value_errors.coded import SENTENCES as SENTENCES
from compressors.contracts.value_errors.coded import SUBJECTS as SUBJECTS
from compressors.contracts.value_errors.coded import value_error as value_error
