"""Faults in the object store, records of results and orders, cache keys and schema versions.

Each ``Fault`` replaces ``old`` by ``new`` in one file; at least one of its ``tests`` must then fail.
A record is a JSON file that ends with the hash of its content (its seal). The manifest of an
artifact lists its files with a hash for each chunk; the hash of this list, the root, is the name of
the artifact. The attempt of an order is a number that is increased to run an equal order again.
"""

from tests.seeded_faults.fault import Fault

STORE = "tests/infra/test_store.py"
RESULTS = "tests/tasks/test_result_records.py"
ORDERS = "tests/tasks/test_order_records.py"
TASK_CALLS = "tests/tasks/test_task_calls.py"
ORDER = "tests/flows/test_order.py"
CODE_DIGEST = "tests/tasks/test_code_digest.py"

FAULTS = (
    Fault(
        id="store-chunks-not-verified",
        file="infra/store/artifact_files.py",
        old="            if sha256(data) != entry.chunks[index]:\n                raise ArtifactDamaged(",
        new="            if not entry.chunks[index]:\n                raise ArtifactDamaged(",
        effect="An artifact with a flipped byte is returned.",
        tests=(f"{STORE}::test_flipped_byte_is_an_error_with_the_chunk[folder]",),
    ),
    Fault(
        id="store-manifest-root-not-verified",
        file="infra/store/object_store.py",
        old="        if not name == manifest.root == compute_root(manifest.files, manifest.chunk_bytes):\n",
        new="        if not name == manifest.root:\n",
        effect="A modified manifest is accepted as the artifact of its name.",
        tests=(f"{STORE}::test_manifest_with_a_changed_hash_is_damage",),
    ),
    Fault(
        id="store-extra-files-accepted",
        file="infra/store/artifact_files.py",
        old="        if refuse_extra and extra:\n",
        new="        if refuse_extra and not extra:\n",
        effect="A file that does not belong to an artifact is loaded with it.",
        tests=(f"{STORE}::test_local_refuses_a_folder_with_a_file_that_is_not_in_the_manifest",),
    ),
    Fault(
        id="store-create-overwrites",
        file="infra/store/folder.py",
        old="                os.link(temporary, path)\n",
        new="                temporary.replace(path)\n",
        effect="Two concurrent writers of one record both report success.",
        tests=(f"{STORE}::test_exactly_one_of_eight_concurrent_creates_succeeds[folder]",),
    ),
    Fault(
        id="store-changing-file-stored",
        file="infra/store/chunks.py",
        old="        if sha256(data) != entry.chunks[index]:\n            raise _build_change_error(path)\n",
        new="",
        effect="A file that changes while it is stored becomes a damaged artifact.",
        tests=(f"{STORE}::test_put_of_a_file_that_changes_meanwhile_stores_no_artifact",),
    ),
    Fault(
        id="store-cached-copy-not-verified",
        file="infra/store/object_store.py",
        old="        return hash_files(folder, files, manifest.chunk_bytes) == manifest.files\n",
        new="        return bool(files)\n",
        effect="A damaged local copy of a remote artifact is used.",
        tests=(f"{STORE}::test_local_fetches_a_damaged_cached_copy_again",),
    ),
    Fault(
        id="store-symlinks-followed",
        file="infra/store/chunks.py",
        old="                if entry.is_symlink():\n",
        new="                if entry.is_symlink() and not entry.is_file():\n",
        effect="A symlink in a stored folder can read any file of the machine.",
        tests=(f"{STORE}::test_put_refuses_symlinks_special_files_and_empty_folders",),
    ),
    Fault(
        id="result-record-of-another-key",
        file="tasks/orchestration/result_records.py",
        old="    if (record.task, record.key) != (task, key):\n",
        new="    if record.task != task:\n",
        effect="A record for other arguments is used as a task's result.",
        tests=(f"{RESULTS}::test_invalid_record_is_refused_and_replaced[record of another key]",),
    ),
    Fault(
        id="result-record-with-artifact-of-two-names",
        file="tasks/orchestration/result_records.py",
        old='        if artifact.uri != f"artifacts/{artifact.sha256}":\n',
        new='        if not artifact.uri.startswith("artifacts/"):\n',
        effect="A forged record refers to two artifacts, one by its URI and one by its hash.",
        tests=(
            f"{RESULTS}::test_invalid_record_is_refused_and_replaced[artifact with another hash in its URI]",
        ),
    ),
    Fault(
        id="result-record-without-seal",
        file="tasks/orchestration/result_records.py",
        old="    if not is_sealed:\n",
        new="    if is_sealed is None:\n",
        effect="A damaged record is read as a result.",
        tests=(f"{RESULTS}::test_invalid_record_is_refused_and_replaced[no seal]",),
    ),
    Fault(
        id="order-record-of-another-order",
        file="tasks/orchestration/order_records.py",
        old="        if report.order != order:\n",
        new="        if not report.order:\n",
        effect="A record refers to the release of another order.",
        tests=(f"{ORDERS}::test_order_record_with_the_release_of_another_order_counts_as_absent",),
    ),
    Fault(
        id="cache-key-without-defaults",
        file="tasks/orchestration/task_calls.py",
        old="    bound.apply_defaults()\n",
        new="",
        effect="An explicit default value changes the cache key, so the task runs again.",
        tests=(f"{TASK_CALLS}::test_content_key_is_the_same_with_an_explicit_default",),
    ),
    Fault(
        id="cache-key-of-object-addresses",
        file="compressors/contracts/artifact.py",
        old='        raise TypeError(f"{type(item).__name__} has no canonical JSON form")\n',
        new="        return repr(item)\n",
        effect="Arguments without a canonical form give keys that change with the process.",
        tests=(
            f"{TASK_CALLS}::test_content_key_of_an_argument_without_canonical_form_is_an_error",
        ),
    ),
    Fault(
        id="order-digest-without-budget",
        file="flows/resolve.py",
        old='            "budget": order.quality_budget(),\n',
        new="",
        effect="Two orders that differ only in the budget share one result.",
        tests=(f"{ORDER}::test_order_digest_differs_for_every_change_that_affects_the_result",),
    ),
    Fault(
        id="order-digest-without-attempt",
        file="flows/resolve.py",
        old='            "attempt": order.attempt,\n',
        new="",
        effect="An order with a new attempt number reuses the result of the first attempt.",
        tests=(f"{ORDER}::test_order_digest_differs_for_every_change_that_affects_the_result",),
    ),
    Fault(
        id="order-digest-without-teachers",
        file="flows/resolve.py",
        old='            "teachers": [[item.artifact.sha256, item.architecture] for item in teachers],\n',
        new="",
        effect="Two orders with different teachers share one result.",
        tests=(f"{ORDER}::test_order_digest_differs_for_other_teachers_and_other_teacher_code",),
    ),
    Fault(
        id="code-digest-without-package-files",
        file="tasks/orchestration/code_digest.py",
        old='                paths |= {path.with_suffix(".py"), path / "__init__.py"}\n',
        new='                paths |= {path.with_suffix(".py")}\n',
        effect="After a change of a package's __init__.py, a task reuses its old result.",
        tests=(CODE_DIGEST,),
    ),
    Fault(
        id="code-digest-without-late-imports",
        file="tasks/orchestration/code_digest.py",
        old="    for node in ast.walk(tree):\n",
        new="    for node in ast.iter_child_nodes(tree):\n",
        effect="After a change of a module imported in a function, a task reuses its old result.",
        tests=(CODE_DIGEST,),
    ),
    Fault(
        id="code-digest-without-templates",
        file="tasks/orchestration/code_digest.py",
        old="    return tuple(sorted(sources.union(*(folder.glob(TEMPLATES) for folder in folders))))\n",
        new="    return tuple(sorted(sources))\n",
        effect="After a change of a page's template, a task reuses the old page.",
        tests=(CODE_DIGEST,),
    ),
    Fault(
        id="s3-damaged-refusal-is-a-setting",
        file="infra/store/s3.py",
        old="    return 400 <= status < 500 and not known\n",
        new="    return False\n",
        effect="A damaged error response of the S3 server ends an order as an invalid setting.",
        tests=(f"{STORE}::test_request_is_repeated_if_its_error_response_was_damaged_in_transit",),
    ),
    Fault(
        id="schema-version-1-label-lost",
        file="infra/bundle/schema_versions.py",
        old="if old in signature}",
        new='if old in signature and old != "label"}',
        effect="A retrieval bundle of schema version 1 counts every row as an interaction.",
        tests=(
            "tests/infra/test_schema_versions.py"
            "::test_migration_moves_the_four_fields_of_version_1_into_one_output",
        ),
    ),
)
