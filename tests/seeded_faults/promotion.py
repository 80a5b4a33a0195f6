"""Faults in the promotion ledger, the registry, and promotions and rollbacks.

Each ``Fault`` replaces ``old`` by ``new`` in one file; at least one of its ``tests`` must then
fail. A judgement is the outcome of one limit; the verdict of a target is derived from its
judgements. The ledger is the list of a model's promotions and rollbacks in the store.
"""

from tests.seeded_faults.fault import Fault

LEDGER = "tests/infra/test_ledger.py"
REGISTRY = "tests/infra/test_registry.py"
LOST = "tests/tasks/test_lost_registry.py"
PROMOTION = "tests/tasks/test_promotion.py"
REPEATED = "tests/tasks/test_repeated_promotions.py"

FAULTS = (
    Fault(
        id="ledger-expected-sequence-ignored",
        file="infra/registry/ledger.py",
        old="            if expected is not None and len(entries) != expected:\n",
        new="            if expected is not None and len(entries) < expected:\n",
        effect="A decision made on an older ledger is appended to a newer one.",
        tests=(
            f"{LEDGER}::test_promotion_that_expects_an_outdated_ledger_raises_with_the_newest_entry",
        ),
    ),
    Fault(
        id="ledger-lost-answer-entered-twice",
        file="infra/registry/ledger.py",
        old="                if self._store.read(key) == body:\n",
        new='                if self._store.read(key) == b"":\n',
        effect="A create whose response was lost appends one decision twice.",
        tests=(f"{LEDGER}::test_append_whose_response_was_lost_writes_one_entry",),
    ),
    Fault(
        id="ledger-rollback-toggles",
        file="infra/registry/ledger.py",
        old='        if entry.action == "rollback":\n            stack.pop()\n',
        new='        if entry.action == "rollback":\n            stack.append(entry)\n',
        effect="Two rollbacks go back and forth instead of two versions back.",
        tests=(f"{LEDGER}::test_two_rollbacks_undo_two_promotions",),
    ),
    Fault(
        id="ledger-entry-of-another-model-accepted",
        file="infra/registry/ledger.py",
        old="        if (entry.sequence, entry.model, entry.previous) "
        "!= (sequence, self._model, previous):\n",
        new="        if (entry.sequence, entry.previous) != (sequence, previous):\n",
        effect="An entry copied from the ledger of another model determines the champion.",
        tests=(
            f"{LEDGER}::test_entry_that_does_not_continue_the_previous_entry_is_reported_as_damage",
        ),
    ),
    Fault(
        id="ledger-digest-not-checked",
        file="infra/registry/ledger.py",
        old="        elif entry.digest != entry.add_digest(previous).digest:\n",
        new="        elif len(entry.digest) != 64:\n",
        effect="A modified entry is read without an error.",
        tests=(f"{LOST}::test_ledger_entry_with_a_changed_value_is_refused",),
    ),
    Fault(
        id="ledger-digest-not-chained",
        file="infra/registry/ledger.py",
        old="        after = None if previous is None else "
        "previous.digest or previous.add_digest(None).digest\n",
        new="        after = None\n",
        effect="An entry's digest does not cover the previous entry.",
        tests=(
            f"{LEDGER}::test_changed_entry_with_a_recomputed_digest_is_detected_at_the_next_entry",
        ),
    ),
    Fault(
        id="ledger-rollback-anywhere",
        file="infra/registry/ledger.py",
        old="        if restored.order != order:\n            raise PromotionRefused(",
        new="        if not restored.order:\n            raise PromotionRefused(",
        effect="A rollback may go to a version that was not champion before.",
        tests=(
            f"{LEDGER}::test_rollback_to_another_version_than_the_previous_champion_is_refused",
        ),
    ),
    Fault(
        id="registry-duplicates-kept",
        file="infra/registry/mlflow_registry.py",
        old="            if winner.version != str(created.version):\n",
        new="            if int(winner.version) > int(created.version):\n",
        effect="Two processes that publish one order create two versions.",
        tests=(
            f"{REGISTRY}::test_concurrent_publishers_keep_the_lowest_version_and_delete_the_others",
        ),
    ),
    Fault(
        id="registry-versions-sorted-as-text",
        file="infra/registry/mlflow_registry.py",
        old="key=lambda entry: -int(entry.version)))",
        new="key=lambda entry: entry.version, reverse=True))",
        effect="Version 9 counts as newer than version 10.",
        tests=(f"{REGISTRY}::test_versions_are_sorted_as_numbers_newest_first",),
    ),
    Fault(
        id="champion-by-version-number",
        file="tasks/promotion/champion.py",
        old="    registered = registry().find_by_order(entry.order, model)\n    if registered is None:\n"
        '        raise PromotionRefused(\n            "champion_not_registered",',
        new="    registered = registry().version(model, entry.version)\n    if registered is None:\n"
        '        raise PromotionRefused(\n            "champion_not_registered",',
        effect="After the registry is rebuilt, the ledger's version number refers to another order.",
        tests=(f"{LOST}::test_champion_is_found_by_its_order_under_another_version_number",),
    ),
    Fault(
        id="version-tag-not-compared",
        file="tasks/promotion/champion.py",
        old="    if (report.name, report.order) != (model, order):\n",
        new="    if report.name != model:\n",
        effect="A version whose tag names another order is promoted.",
        tests=(f"{LOST}::test_version_whose_tag_names_another_order_is_not_promoted",),
    ),
    Fault(
        id="acceptance-trusts-the-report",
        file="tasks/promotion/acceptance.py",
        old="    if outcome != report.outcome:\n",
        new="    outcome = report.outcome\n    if not outcome:\n",
        effect="A report that was modified to 'accepted' is promoted.",
        tests=(f"{LOST}::test_report_whose_outcome_contradicts_its_verdicts_is_not_promoted",),
    ),
    Fault(
        id="acceptance-judgements-not-computed-again",
        file="tasks/promotion/acceptance.py",
        old="    outcome = judge.recompute_outcome(verdict)\n",
        new="    outcome = verdict.outcome\n",
        effect="A verdict that contradicts its judgements is promoted.",
        tests=(f"{LOST}::test_report_that_contradicts_itself_is_not_promoted",),
    ),
    Fault(
        id="promotion-of-undecided-version",
        file="tasks/promotion/acceptance.py",
        old='    if outcome != "accepted":\n',
        new='    if outcome == "rejected":\n',
        effect="An undecided version becomes champion.",
        tests=(f"{PROMOTION}::test_only_an_accepted_version_becomes_candidate_or_champion",),
    ),
    Fault(
        id="repeated-rollback-goes-back-twice",
        file="tasks/promotion/promotions.py",
        old="""    return (
        datetime.fromisoformat(last.at) > command_start
        or registry().read_confirmation(model) != last.digest
    )
""",
        new="    return False\n",
        effect="Repeating an interrupted rollback goes back two versions.",
        tests=(f"{REPEATED}::test_repeated_rollback_completes_an_interrupted_one",),
    ),
    Fault(
        id="fetch-gives-rejected-targets",
        file="tasks/promotion/promotions.py",
        old='    if outcome in {"rejected", "undecided"} and not unaccepted:\n',
        new='    if outcome in {"undecided"} and not unaccepted:\n',
        effect="The graph or engine of a rejected target is fetched without --unaccepted.",
        tests=(f"{PROMOTION}::test_target_without_acceptance_is_fetched_only_with_its_option",),
    ),
)
