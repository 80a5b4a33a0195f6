"""An order for a ranking model, with limits on list metrics, bytes and latency.

``write_draft`` writes a draft: the folder that becomes a bundle when it is packed.
"""

from pathlib import Path

from drafts import write_draft
from orders import run_without_prefect

from compressors.contracts import Limit
from flows.order import Order
from tasks.bundles.packing import pack


def test_ranking_model_is_judged_on_its_groups(work_folder: Path) -> None:
    pack(write_draft(work_folder / "draft", name="ranker", task="ranking"))
    texts = ("ndcg@10 vs baseline >= -0.02", "ndcg@3 vs baseline >= -0.1",
             "mrr@10 vs baseline >= -0.1", "map@100 >= 0.05", "hit@3 vs baseline >= -0.1",
             "recall@3 vs baseline >= -0.1", "bytes vs baseline <= 0.5",
             "p50_ms@7 vs baseline <= 10")  # fmt: skip
    limits = tuple(map(Limit.parse, texts))
    result = run_without_prefect(Order(model="ranker", preset="safe", limits=limits))
    report = result.finished.report
    assert report.outcome == "accepted", report.targets[0].verdict.reason
    assert report.measurement is not None
    ndcg = report.measurement.numbers.of("ndcg@10", "absolute")
    assert ndcg is not None
    assert 0.5 < ndcg.point < 1
    # Two limits have a depth (3 top ranks) and a batch size (7) that are not measured by default.
    judged = {str(item.limit): item.measured for item in report.targets[0].verdict.judgements}
    assert None not in judged.values()
    ndcg_3 = report.measurement.baseline.of("ndcg@3", "absolute")
    assert ndcg_3 is not None
    assert ndcg_3.point < ndcg.point
    assert report.measurement.baseline.of("p50_ms@7", "absolute") is not None
    # The unit of score changes: standard deviations of the baseline's scores.
    assert report.measurement.numbers.score_unit == "spread"
    changed_top = report.measurement.numbers.of("changed_top1", "absolute")
    assert changed_top is not None
    # "changed_top1" is the share of lists (groups) whose row with the highest score has changed.
    # Lists without a relevant item have such a row, but no NDCG.
    assert changed_top.groups is not None
    assert ndcg.groups is not None
    assert changed_top.groups >= ndcg.groups
    # The int8 tables of preset "safe" change that row in few lists.
    assert 0 <= changed_top.point < 0.5
