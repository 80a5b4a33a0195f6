"""Errors in values of documents, orders and settings: each has a code, fields and a sentence.

Each file except ``coded.py`` maps codes to sentences with fields in braces.

coded.py      the function ``value_error``, which creates an error that pydantic reports
signature.py  errors in the inputs and the signature of a model
limits.py     errors in limits and measured numbers
steps.py      errors in settings of steps
orders.py     errors in orders and their data rules
bundles.py    errors in paths and JSON of bundles
storage.py    errors in manifests of stored artifacts and in ``RECPRESS_HOME``
serving.py    errors in engine profiles and Triton models
"""

from compressors.contracts.value_errors.coded import SENTENCES as SENTENCES
from compressors.contracts.value_errors.coded import SUBJECTS as SUBJECTS
from compressors.contracts.value_errors.coded import value_error as value_error
