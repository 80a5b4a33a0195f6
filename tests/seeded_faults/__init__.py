"""Mutation tests: known faults that the default test tier must detect, applied one at a time.

``python -m tests.seeded_faults`` applies each fault to a copy of the repository and runs the tests
that the fault names. When you fix a bug, add the fault that restores it.
``tests/test_seeded_faults.py`` checks that all faults apply to the current code.

fault.py       a fault: file, text, replacement, effect and tests
runner.py      one fault in a copy of the repository
formats.py     rounding, scales, clipping, selection of a table format
layouts.py     bit packing, compiled kernels, maps of rows
lowering.py    graphs, graph passes, parity, audit
lookups.py     merged lookups, codes of tables in int8 layers
metrics.py     metrics, intervals, rankings, score changes
verdicts.py    limits, judgements, verdicts
promotion.py   promotions and rollbacks, their list in the store (ledger), registry
storage.py     object store, records, cache keys, schema versions
security.py    names, credentials, paths, JSON, pages, access
orders.py      flows, command line, orders, exit codes, outages
training.py    distillation, pruning, calibration, training, data checks
"""

from tests.seeded_faults import (
    formats,
    layouts,
    lookups,
    lowering,
    metrics,
    orders,
    promotion,
    security,
    storage,
    training,
    verdicts,
)
from tests.seeded_faults.fault import Fault

FAULTS: tuple[Fault, ...] = (
    *formats.FAULTS,
    *layouts.FAULTS,
    *lowering.FAULTS,
    *lookups.FAULTS,
    *metrics.FAULTS,
    *verdicts.FAULTS,
    *promotion.FAULTS,
    *storage.FAULTS,
    *security.FAULTS,
    *orders.FAULTS,
    *training.FAULTS,
)
