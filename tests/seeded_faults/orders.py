"""Faults in flows, the command line, orders, exit codes and waiting for services.

Each ``Fault`` replaces ``old`` by ``new`` in one file; at least one of its ``tests`` must then fail.
The form is the flow's page in Prefect's web interface, from which an order can be started. A
calibration map is fitted by the step ``recalibrate`` and applied to the scores.
"""

from tests.seeded_faults.fault import Fault

CLI = "tests/flows/test_cli.py"
ORDER = "tests/flows/test_order.py"
OUTAGES = "tests/tasks/test_outages.py"
TASK_CALLS = "tests/tasks/test_task_calls.py"

FAULTS = (
    Fault(
        id="bad-input-exits-with-1",
        file="flows/cli/errors.py",
        old="    if isinstance(shown, Refused | CompressionError):\n"
        '        _print(f"recpress: {shown}")\n        return 2\n',
        new="    if isinstance(shown, Refused | CompressionError):\n"
        '        _print(f"recpress: {shown}")\n        return 1\n',
        effect="Invalid input has the exit code of an error that a retry may solve.",
        tests=(f"{CLI}::test_invalid_order_exits_with_code_2_and_a_sentence",),
    ),
    Fault(
        id="out-of-memory-shown-as-unexpected-error",
        file="flows/cli/errors.py",
        old="    shown: Exception = convert_to_out_of_memory(fault, quote_command(sys.argv[1:])) or fault\n",
        new="    shown: Exception = fault\n",
        effect="Out of memory is reported like an unexpected error, without advice.",
        tests=(
            "tests/flows/test_exit_codes.py::test_memory_error_exits_with_code_1_and_one_sentence",
        ),
    ),
    Fault(
        id="rejected-result-exits-with-0",
        file="flows/cli/app.py",
        old='EXIT_CODES = {"accepted": 0, "rejected": 3,',
        new='EXIT_CODES = {"accepted": 0, "rejected": 0,',
        effect="A rejected result ends with exit code 0, so a pipeline deploys it.",
        tests=(
            "tests/flows/test_exit_codes.py"
            "::test_completed_order_exits_with_the_code_of_its_outcome",
        ),
    ),
    Fault(
        id="missing-module-called-out-of-memory",
        file="flows/cli/errors.py",
        old='        message = NO_MEMORY if is_limited() else INCOMPLETE.replace("{missing}", f"{missing}")\n',
        new="        message = NO_MEMORY\n",
        effect="A command whose modules cannot be imported claims to be out of memory.",
        tests=(
            "tests/flows/test_order_memory.py::test_missing_module_is_not_reported_as_out_of_memory",
        ),
    ),
    Fault(
        id="order-with-shrinking-batches",
        file="flows/terms.py",
        old="        if not self.smallest_batch <= self.best_batch <= self.largest_batch:\n",
        new="        if not self.smallest_batch <= self.largest_batch:\n",
        effect="An order's best batch may be outside of its range; the engine build fails.",
        tests=(f"{ORDER}::test_decreasing_batch_sizes_are_refused",),
    ),
    Fault(
        id="order-without-targets",
        file="flows/terms.py",
        old="        if not self.requirements():\n",
        new="        if self.requirements() is None:\n",
        effect="An order for no target runs and publishes nothing.",
        tests=(f"{ORDER}::test_order_without_targets_is_refused",),
    ),
    Fault(
        id="order-map-not-last",
        file="flows/order.py",
        old='            if step.effect == "output":\n',
        new='            if step.effect == self.steps[-1].effect == "output":\n',
        effect="A calibration map is fitted before later steps change the scores.",
        tests=(f"{ORDER}::test_step_after_recalibrate_is_refused",),
    ),
    Fault(
        id="order-steps-ignored-with-a-preset",
        file="flows/order.py",
        old='        if (self.preset == "custom") != bool(self.steps):\n',
        new='        if self.preset == "custom" and not self.steps:\n',
        effect="Steps given with a preset are silently ignored.",
        tests=(f"{ORDER}::test_steps_are_required_with_preset_custom_and_refused_with_others",),
    ),
    Fault(
        id="order-limits-not-checked",
        file="flows/terms.py",
        old="        if problems := limit_problems(limits):\n",
        new="        if problems := limit_problems(limits[:0]):\n",
        effect="Meaningless limits pass in the command line, order files and the form.",
        tests=(
            "tests/compressors/contracts/test_limits.py"
            "::test_order_with_an_implausible_limit_is_refused_but_a_stored_limit_is_read",
        ),
    ),
    Fault(
        id="outage-never-given-up",
        file="tasks/orchestration/outages.py",
        old="        if time.monotonic() - self._began + delay > DEADLINE_SECONDS:\n",
        new="        if delay > DEADLINE_SECONDS:\n",
        effect="A run waits forever for an unavailable service.",
        tests=(f"{OUTAGES}::test_deadline_of_a_task_run_begins_at_its_first_fault",),
    ),
    Fault(
        id="wrong-credentials-waited-for",
        file="tasks/orchestration/outages.py",
        old="        case httpx.HTTPStatusError() if fault.response.status_code >= _SERVER_FAULTS:\n",
        new="        case httpx.HTTPStatusError():\n",
        effect="With wrong credentials for Prefect's API, a command waits for ten minutes.",
        tests=(
            f"{OUTAGES}::test_find_service_returns_a_name_only_for_faults_of_unavailable_services",
        ),
    ),
    Fault(
        id="bad-order-retried",
        file="tasks/orchestration/task_calls.py",
        old="    return isinstance(fault, InfraError) and run.run_count <= OTHER_RETRIES\n",
        new="    return run.run_count <= OTHER_RETRIES\n",
        effect="A task that rejects its input runs three times.",
        tests=(f"{TASK_CALLS}::test_refused_order_or_bug_is_not_retried",),
    ),
    Fault(
        id="task-without-our-options",
        file="tasks/validate.py",
        old='@task(task_run_name="validate", **TASK_OPTIONS)\n',
        new='@task(task_run_name="validate")\n',
        effect="A task is not retried, and Prefect stores its result.",
        tests=(TASK_CALLS,),
    ),
    Fault(
        id="planted-prefect-result-followed",
        file="tasks/orchestration/task_calls.py",
        old="    if data is None or isinstance(data, ResultRecordMetadata) or not state.is_completed():\n",
        new="    if data is None or not state.is_completed():\n",
        effect="A result that Prefect's API refers to is used as the result of a run.",
        tests=(
            f"{TASK_CALLS}::test_local_result_never_reads_the_location_named_by_a_state_of_the_api",
        ),
    ),
)
