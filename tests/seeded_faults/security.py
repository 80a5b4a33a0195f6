"""Faults in the handling of hostile names, credentials, paths, JSON, pages and access.

Each ``Fault`` replaces ``old`` by ``new`` in one file; at least one of its ``tests`` must then fail.
A draft is a folder from which a bundle is packed. The seal of a bundle is the last
field of its ``model.json``: the hash of all bytes before it.
"""

from tests.seeded_faults.fault import Fault

ARCHITECTURE = "tests/infra/test_architecture.py"
BUNDLE = "tests/infra/test_bundle.py"
CREDENTIALS = "tests/infra/test_credentials.py"
HTML = "tests/infra/test_html.py"
JSON_LIMITS = "tests/infra/test_json_limits.py"
SERVER = "tests/flows/test_server_settings.py"
TEXT = "tests/flows/test_terminal_text.py"

FAULTS = (
    Fault(
        id="allow-list-by-prefix",
        file="infra/bundle/architecture.py",
        old='return module_name == root or module_name.startswith(f"{root}.")',
        new="return module_name.startswith(root)",
        effect="Allowing module 'a.b' also allows 'a.bc'.",
        tests=(f"{ARCHITECTURE}::test_module_that_is_not_allowed_is_refused_without_an_import",),
    ),
    Fault(
        id="allow-list-checked-after-import",
        file="infra/bundle/architecture.py",
        old="    if not any(is_within(module_name, root) for root in allowed):\n        raise BundleRefused(\n"
        '            "architecture_not_allowed",',
        new="    if not allowed:\n        raise BundleRefused(\n"
        '            "architecture_not_allowed",',
        effect="A bundle's module is imported, which runs its code, before it is rejected.",
        tests=(f"{ARCHITECTURE}::test_module_that_is_not_allowed_is_refused_without_an_import",),
    ),
    Fault(
        id="architecture-getattr-runs-code",
        file="infra/bundle/architecture.py",
        old="loaded = vars(module).get(class_name)",
        new="loaded = getattr(module, class_name, None)",
        effect="The __getattr__ of a module determines the class of a bundle.",
        tests=(f"{ARCHITECTURE}::test_network_class_does_not_call_the_getattr_of_a_module",),
    ),
    Fault(
        id="argument-classes-of-any-module",
        file="infra/bundle/architecture.py",
        old="    return _import_class(path, allowed, object)",
        new="    return _import_class(path, (module_name,), object)",
        effect="A bundle creates objects of modules that are not allowed.",
        tests=(
            "tests/infra/test_live_model.py::"
            "test_argument_class_of_another_module_raises_before_it_is_imported",
        ),
    ),
    Fault(
        id="onnx-external-data-outside-of-the-folder",
        file="infra/bundle/onnx_file.py",
        old="    return file.resolve().is_relative_to(folder.resolve())",
        new="    return True",
        effect="An ONNX file names any file of the machine as the values of a weight.",
        tests=(
            "tests/infra/test_onnx_file.py::test_external_data_outside_of_the_folder_is_refused",
        ),
    ),
    Fault(
        id="onnx-external-data-of-a-function-in-the-current-folder",
        file="infra/bundle/onnx_file.py",
        old="            tensor.base_dir = path.parent\n",
        new="",
        effect="Weights in the body of a function are read from the folder of the process.",
        tests=(
            "tests/infra/test_onnx_file.py"
            "::test_external_data_of_a_function_is_read_from_the_folder_of_the_file",
        ),
    ),
    Fault(
        id="attribute-names-run-as-code",
        file="compressors/core/state/construction.py",
        old="            if _UNSAFE_IN_TEXT.search(name):\n",
        new="            if _UNSAFE_IN_TEXT.fullmatch(name):\n",
        effect="A module name in a bundle runs as code when the network is traced.",
        tests=(
            "tests/compressors/core/test_construction.py"
            "::test_attribute_name_that_could_run_as_code_is_refused",
        ),
    ),
    Fault(
        id="bundle-path-climbs-out",
        file="infra/bundle/paths.py",
        old='    if ".." in PurePosixPath(text).parts:\n',
        new='    if text.startswith("../"):\n',
        effect="A path such as 'x/../../secret' in a draft reads files outside of its folder.",
        tests=(f"{BUNDLE}::test_unsafe_draft_path_is_refused",),
    ),
    Fault(
        id="bundle-seal-not-checked",
        file="infra/bundle/bundle_folder.py",
        old="    if raw[-seal_length:] != _seal_line(raw[:-seal_length]):\n",
        new="    if len(raw) < seal_length:\n",
        effect="An edited model.json of a sealed bundle is accepted.",
        tests=(f"{BUNDLE}::test_edited_manifest_is_reported_as_another_seal",),
    ),
    Fault(
        id="refusal-quotes-without-end",
        file="infra/printable.py",
        old='    return f"{sentence[: MAX_SENTENCE_CHARACTERS - 3]}..."\n',
        new="    return sentence\n",
        effect="A refusal prints a value of 100,000 characters.",
        tests=(f"{BUNDLE}::test_refusal_with_long_values_has_a_bounded_length",),
    ),
    Fault(
        id="printable-keeps-direction-marks",
        file="infra/printable.py",
        old="\\\\u200b-\\\\u200f\\\\u2028-\\\\u202e",
        new="\\\\u200b-\\\\u200d\\\\u2028-\\\\u2029",
        effect="A name can reorder the text of a terminal or a log.",
        tests=(
            f"{TEXT}::test_log_records_escape_control_characters_and_records_of_recpress_are_one_line",
        ),
    ),
    Fault(
        id="log-line-forged-by-line-end",
        file="tasks/orchestration/log_lines.py",
        old='record.msg, record.args = "\\n- ".join(map(one_line, lines)), ()',
        new='record.msg, record.args = "\\n- ".join(map(printable, lines)), ()',
        effect="A name with a line end forges a line of the log.",
        tests=(
            f"{TEXT}::test_log_records_escape_control_characters_and_records_of_recpress_are_one_line",
        ),
    ),
    Fault(
        id="json-depth-unlimited",
        file="infra/bundle/json_limits.py",
        old="    if size.depth > MAX_JSON_DEPTH:\n",
        new="    if size.depth > 1000 * MAX_JSON_DEPTH:\n",
        effect="Untrusted JSON is parsed without a limit on its depth.",
        tests=(f"{JSON_LIMITS}::test_64_levels_are_accepted_and_65_are_refused",),
    ),
    Fault(
        id="json-counts-brackets-in-text",
        file="infra/bundle/json_limits.py",
        old="        kinds = np.where((quotes + is_in_string) & 1, 0, _KINDS[block])\n",
        new="        kinds = _KINDS[block]\n",
        effect="Brackets inside a text count as nesting, so ordinary JSON is refused.",
        tests=(f"{JSON_LIMITS}::test_measure_ignores_text_in_strings",),
    ),
    Fault(
        id="credentials-encoded-secrets-shown",
        file="infra/credentials.py",
        old='        for form in (text, quote(text, safe=""), quote(text), quote_plus(text), '
        "repr(text)[1:-1]):\n",
        new="        for form in (text,):\n",
        effect="A percent-encoded password is printed.",
        tests=(f"{CREDENTIALS}::test_mask_credentials_hides_encoded_values_of_secret_variables",),
    ),
    Fault(
        id="credentials-login-in-address-shown",
        file="infra/credentials.py",
        old='    return _QUERY.sub(rf"\\g<1>{HIDDEN}", _LOGIN.sub(f"{HIDDEN}@", text))\n',
        new='    return _QUERY.sub(rf"\\g<1>{HIDDEN}", text)\n',
        effect="Credentials in a URL of a library's error message are printed.",
        tests=(
            f"{CREDENTIALS}::test_mask_credentials_hides_logins_and_tokens_in_addresses_and_no_other_text",
        ),
    ),
    Fault(
        id="credentials-cause-keeps-secret",
        file="infra/credentials.py",
        old="            fault.__cause__ = fault.__context__ = None\n",
        new="            fault.__cause__ = earlier\n",
        effect="The cause of an exception writes a credential to Prefect's database.",
        tests=(f"{CREDENTIALS}::test_clean_exceptions_removes_secrets_and_keeps_the_class",),
    ),
    Fault(
        id="embedded-server-fixed-secret",
        file="flows/server/embedded_server.py",
        old='    return f"recpress:{secrets.token_hex(24)}"\n',
        new='    return "recpress:recpress"\n',
        effect="The embedded Prefect server has a fixed, public password.",
        tests=(SERVER,),
    ),
    Fault(
        id="embedded-server-without-authentication",
        file="flows/server/embedded_server.py",
        old='        "PREFECT_SERVER_API_AUTH_STRING": auth,\n',
        new="",
        effect="The embedded Prefect server requires no authentication.",
        tests=(SERVER,),
    ),
    Fault(
        id="embedded-server-allows-every-origin",
        file="flows/server/embedded_server.py",
        old='        "PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS": NO_ORIGIN,\n'
        '        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": NO_ORIGIN,\n',
        new="",
        effect="A web page may call the API of the embedded Prefect server.",
        tests=(SERVER,),
    ),
    Fault(
        id="home-with-question-mark",
        file="infra/settings.py",
        old='    if "?" not in str(file):\n',
        new='    if "?" not in str(file) or True:\n',
        effect="A '?' in RECPRESS_HOME moves the registry to another folder.",
        tests=("tests/infra/test_settings.py::test_build_sqlite_uri_opens_its_file_for_any_path",),
    ),
    Fault(
        id="pages-not-escaped",
        file="infra/pages/html.py",
        old="        autoescape=True,\n",
        new="        autoescape=False,\n",
        effect="A name in a model or its data becomes HTML of the report.",
        tests=(
            f"{HTML}::test_render_escapes_text_and_inserts_markup_unchanged",
            "tests/tasks/test_report_page.py::test_names_and_texts_of_a_model_are_escaped_in_the_page",
        ),
    ),
    Fault(
        id="pages-with-control-characters",
        file="infra/pages/html.py",
        old="    return printable(_create_environment().get_template(template).render(values))\n",
        new="    return _create_environment().get_template(template).render(values)\n",
        effect="A name on a page may hide characters or reorder those around it.",
        tests=(f"{TEXT}::test_rendered_page_escapes_the_control_characters_of_its_title",),
    ),
)
