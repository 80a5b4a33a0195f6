"""The order files of the stored home, and the commands that run between the orders.

The models ``clicks``, ``ranker`` and ``finder`` are those of ``drafts.py``. A home is the folder
with everything that recpress stores (``RECPRESS_HOME``). A draft is the folder of a bundle before
it is packed.
"""

from typing import Any

from tests.stored_home.steps import QUICK

ORDERS: dict[str, dict[str, Any]] = {
    # Accepted; the order promotes the result.
    "pruned": {
        "model": "clicks@1",
        "preset": "custom",
        "steps": [
            {"kind": "prune_rows", "min_lookups": 2, "pruned": "shared"},
            {"kind": "channels", "keep": 0.5},
            {"kind": "fold"},
            {"kind": "rowwise_int4", "clipping": "least_squares"},
            {"kind": "static_int8"},
            {"kind": "recalibrate", "method": "platt"},
        ],
        "limits": [
            {"metric": "auc", "against": "baseline", "at_least": -0.15},
            {"metric": "bytes", "against": "baseline", "at_most": 0.9},
        ],
        "promote": True,
    },
    # Accepted; one command promotes the result, and another one rolls it back. The engine of the
    # optional target is built and not measured.
    "safe": {
        "model": "clicks@1",
        "preset": "safe",
        "limits": [{"metric": "auc", "against": "baseline", "at_least": -0.1}],
        "targets": {"onnxruntime": "required", "tensorrt_rtx": "optional"},
    },
    # Rejected: no compression improves AUC that much. A registered model is the teacher.
    "taught": {
        "model": "clicks@1",
        "preset": "custom",
        "steps": [
            {"kind": "low_rank", "rank": 0.25},
            {"kind": "distill", "training": QUICK},
            {"kind": "kmeans", "bits": 4},
            {"kind": "weight_int8"},
        ],
        "limits": [{"metric": "auc", "against": "champion", "at_least": 0.15}],
        "teachers": ["registry:clicks@1"],
        "seed": 3,
    },
    # Undecided: the interval of the difference contains the bound.
    "fast": {
        "model": "clicks",
        "preset": "fast",
        "limits": [
            {"metric": "auc", "against": "baseline", "at_least": 0.0},
            {"metric": "max_score_change", "against": "absolute", "at_most": 0.9},
        ],
        "attempt": 1,  # a number that is increased to run an equal order again
    },
    # Accepted: a ranking model with grades as labels, and a budget that all steps stay within.
    "graded": {
        "model": "ranker@1",
        "preset": "custom",
        "steps": [
            {"kind": "product_codes", "parts": 4, "bits": 4, "codebook_share": 1.0},
            {"kind": "refit_codes", "rounds": 1, "training": QUICK},
            {"kind": "weight_int4", "block": 16},
        ],
        "limits": [{"metric": "ndcg@10", "against": "baseline", "at_least": -0.15}],
        "budget": 0.5,
        "promote": True,
    },
    # Accepted: a retrieval model, whose release has two graphs.
    "towers": {
        "model": "finder@1",
        "preset": "custom",
        "steps": [{"kind": "rowwise_int8"}, {"kind": "float16"}],
        "limits": [{"metric": "recall@20", "against": "baseline", "at_least": -0.15}],
        "promote": True,
    },
}
"""Orders by name, in the sequence in which they run."""

OUTCOMES = {
    "pruned": "accepted",
    "safe": "accepted",
    "taught": "rejected",
    "fast": "undecided",
    "graded": "accepted",
    "towers": "accepted",
}

COMMANDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "safe": (
        ("registry", "promote", "clicks", "--version", "2", "--reason", "fewer bytes"),
        ("registry", "rollback", "clicks", "--reason", "a try"),
    ),
}
"""Commands that run after an order, by the name of the order."""
