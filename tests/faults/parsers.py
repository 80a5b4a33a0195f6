"""All parsers of untrusted bytes, with valid inputs for fuzzing.

Each function takes an empty folder and returns a ``Parser``: valid inputs, and a function that
parses bytes as a command does. ``fuzzing.py`` mutates the inputs and calls the parser. A draft is
the folder of a bundle before it is packed. The ledger is the list of a model's promotions and
rollbacks in the store.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import drafts
import torch
import yaml
from safetensors.torch import save_file

from flows.cli import orders
from infra.bundle.bundle_folder import parse_manifest, read_draft
from infra.bundle.shards import stored_tensors
from infra.data.split_statistics import split_statistics
from infra.registry.ledger import Entry, Ledger
from infra.registry.mlflow_registry import RegisteredVersion
from infra.services.compose import COMPOSE, find_required_secrets, read_services, read_variables
from infra.store.object_store import Store
from infra.store.records import read_record, seal_record
from infra.triton.pbtxt import format_message
from infra.triton.repository import version_in
from tasks.bundles import table_files
from tasks.bundles.packing import pack
from tasks.orchestration.documents import Finished, Report, read_report
from tasks.orchestration.order_records import build_finished_key, find_finished_order
from tasks.orchestration.workspace import local, store
from tasks.promotion import registry_listing

ORDER_DIGEST = "a" * 64
ROWS = {"train": 40, "calibration": 20, "validation": 20, "test": 40}


@dataclass(frozen=True)
class Parser:
    """A parser and its valid inputs.

    Args:
        valid_inputs: inputs that the parser accepts.
        parse: parses bytes; returns a result, or raises one of this project's errors.
        is_json: whether inputs are JSON documents, whose values are also mutated.
    """

    valid_inputs: tuple[bytes, ...]
    parse: Callable[[bytes], object]
    is_json: bool = True


def draft_document(folder: Path) -> Parser:
    """Return the parser of a draft's ``model.json``."""
    draft = drafts.write_draft(folder / "draft", rows=ROWS)
    file = draft / "model.json"
    document = json.loads(file.read_bytes())
    document["vocabularies"] = {"v": "model.json"}
    document["network"]["ties"] = {"a.weight": "user.weight"}

    def parse(body: bytes) -> object:
        file.write_bytes(body)
        return read_draft(draft)

    return Parser((json.dumps(document).encode(),), parse)


def sealed_document(folder: Path) -> Parser:
    """Return the parser of a packed bundle's ``model.json``."""
    packed = pack(drafts.write_draft(folder / "draft", rows=ROWS))
    bundle = local(packed.artifact)
    return Parser(
        ((bundle / "model.json").read_bytes(),), lambda body: parse_manifest(body, bundle)
    )


def safetensors_header(folder: Path) -> Parser:
    """Return the parser of the header of a weights file."""
    draft = drafts.write_draft(folder / "draft", rows=ROWS)
    file = draft / "model.safetensors"
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")

    def parse(body: bytes) -> object:
        file.write_bytes(len(body).to_bytes(8, "little") + body + content[end:])
        return stored_tensors(draft)

    return Parser((content[8:end].rstrip(),), parse)


def safetensors_file(folder: Path) -> Parser:
    """Return the parser of a complete weights file, including its length field."""
    draft = drafts.write_draft(folder / "draft", rows=ROWS)
    file = draft / "model.safetensors"
    tensors = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(2, dtype=torch.int8)}
    save_file(tensors, file)
    content = file.read_bytes()

    def parse(body: bytes) -> object:
        file.write_bytes(body)
        return stored_tensors(draft)

    return Parser((content,), parse, is_json=False)


def parquet_file(folder: Path) -> Parser:
    """Return the parser of a draft's data file."""
    draft = drafts.write_draft(folder / "draft", rows=ROWS)
    signature = read_draft(draft).signature
    file = folder / "split.parquet"

    def parse(body: bytes) -> object:
        file.write_bytes(body)
        return split_statistics(file, signature)

    valid_inputs = tuple((draft / f"{split}.parquet").read_bytes() for split in ("test", "train"))
    return Parser(valid_inputs, parse, is_json=False)


def order_file(folder: Path) -> Parser:
    """Return the parser of order files."""
    file = folder / "order.json"
    order = {
        "model": "clicks",
        "preset": "custom",
        "steps": [
            {"kind": "rowwise_int8", "tables": ["user", "it*"]},
            {"kind": "static_int8", "layers": ["mlp.*"]},
        ],
        "limits": [{"metric": "auc", "against": "baseline", "at_least": -0.002}],
        "targets": {"onnxruntime": "required"},
        "rules": {"min_rows": {"test": 1}},
        "promote": False,
        "seed": 0,
        "teachers": ["registry:x@1"],
    }

    def parse(body: bytes) -> object:
        file.write_bytes(body)
        return orders.order_from_options(order=file)

    return Parser((json.dumps(order).encode(),), parse)


def limit(_: Path) -> Parser:
    """Return the parser of the option ``--limit``."""
    texts = (
        "auc vs baseline >= -0.002",
        "bytes vs baseline <= 0.5",
        "p99_ms@64 <= 3",
        "logloss vs champion <= 1e-3",
        "recall@20 >= 0.1",
    )

    def parse(body: bytes) -> object:
        text = body.decode(errors="surrogateescape")
        return orders.build_terms(
            "clicks",
            preset="safe",
            limits=[text],
            targets=None,
            optional=[],
            promote=False,
            seed=0,
        )

    return Parser(tuple(text.encode() for text in texts), parse, is_json=False)


def record(folder: Path) -> Parser:
    """Return the parser of sealed records: JSON whose last field is a hash of the bytes before."""
    object_store = Store(str(folder / "store"))
    bundle = {"artifact": {"uri": f"artifacts/{ORDER_DIGEST}", "sha256": ORDER_DIGEST, "bytes": 1}}

    def parse(body: bytes) -> object:
        object_store.write("bundles/m/1.json", body)
        return read_record(object_store, "bundles/m/1.json")

    return Parser((seal_record(bundle), seal_record({"schema_version": 2})), parse)


def order_record(folder: Path) -> Parser:
    """Return the parser of the record of a finished order."""
    _publish_version(folder)
    key = build_finished_key(ORDER_DIGEST)
    body = store().read(key)

    def parse(changed: bytes) -> object:
        store().write(key, changed)
        return find_finished_order(ORDER_DIGEST)

    return Parser((body,), parse)


def report(folder: Path) -> Parser:
    """Return the parser of the report in a release."""
    published = _publish_version(folder)
    body = store().file(published.release, "report.json")
    scratch = folder / "release"

    def parse(changed: bytes) -> object:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        (scratch / "report.json").write_bytes(changed)
        artifact = store().put(scratch)
        try:
            parsed: Report = read_report(artifact)
        finally:
            shutil.rmtree(store().folder / "artifacts" / artifact.sha256)  # type: ignore[operator]
        return parsed

    return Parser((body,), parse)


def artifact_manifest(folder: Path) -> Parser:
    """Return the parser of an artifact's manifest."""
    (folder / "files").mkdir()
    (folder / "files" / "a").write_bytes(b"12345")
    object_store = Store(str(folder / "store"))
    artifact = object_store.put(folder / "files")
    file = folder / "store" / "artifacts" / artifact.sha256 / "manifest.json"
    body = file.read_bytes()
    file.chmod(0o644)

    def parse(changed: bytes) -> object:
        file.write_bytes(changed)
        return object_store.manifest(artifact)

    return Parser((body,), parse)


def ledger_entry(folder: Path) -> Parser:
    """Return the parser of ledger entries; the input is the second of two."""
    object_store = Store(str(folder / "store"))
    ledger = Ledger(object_store, "m")
    ledger.append("1", ORDER_DIGEST, "promote", by="me", reason="first")
    second: Entry = ledger.append("2", "b" * 64, "promote", by="me", reason="second")
    key = f"ledger/m/{second.sequence:08d}.json"
    body = object_store.read(key)

    def parse(changed: bytes) -> object:
        object_store.write(key, changed)
        return ledger.entries()

    return Parser((body,), parse)


def registry_tags(folder: Path) -> Parser:
    """Return the parser of a registered version's tags."""
    object_store = Store(str(folder / "store"))
    tags = {
        "recpress.order": ORDER_DIGEST,
        "recpress.recipe": '[{"kind": "rowwise_int8", "tables": ["*"]}]',
        "recpress.outcome": "accepted",
        "recpress.bundle": "m@1",
        "recpress.report": f"artifacts/{ORDER_DIGEST}/files/report.html",
        "recpress.artifact.onnxruntime": f"artifacts/{ORDER_DIGEST}",
    }

    def parse(body: bytes) -> object:
        try:
            document = json.loads(body)
            texts = {str(name): str(value) for name, value in document.items()}
            source = texts.pop("source", "")
            item = RegisteredVersion(model="m", version="1", source=source, tags=texts, aliases=())
        except (ValueError, AttributeError, RecursionError):
            return None  # a registry cannot store such tags
        if "recpress.order" not in texts:
            return None  # such versions are not listed
        return registry_listing._describe_version(item, object_store)

    return Parser((json.dumps({**tags, "source": f"artifacts/{ORDER_DIGEST}"}).encode(),), parse)


def triton_configuration(folder: Path) -> Parser:
    """Return a parser that reads the version in ``config.pbtxt``, and formats such a file.

    The formatted file has the whole input as the model's name.
    """
    message = {"name": "m", "version_policy": {"specific": {"versions": [3]}}, "note": 'a "b"\n'}

    def parse(body: bytes) -> object:
        version_in(body)
        try:
            return format_message({"name": body.decode(errors="surrogateescape"), "dims": [1, -1]})
        except (ValueError, TypeError):  # text that the writer rejects
            return None

    return Parser((format_message(message).encode(),), parse, is_json=False)


def compose_file(folder: Path) -> Parser:
    """Return the parser of ``docker-compose.yml`` for ``make up-local``."""
    text = COMPOSE.read_text(encoding="utf-8")
    file = folder / "docker-compose.yml"
    variables = dict.fromkeys(find_required_secrets(text), "x")
    document = yaml.safe_load(text)
    small = {**document, "services": dict(list(document["services"].items())[:3])}

    def parse(body: bytes) -> object:
        file.write_bytes(body)
        return read_services(
            variables,
            folder,
            compose=file,
            ports=lambda requested: {port: port for port in requested},
        )

    return Parser((json.dumps(small, default=str).encode(),), parse)


def env_file(folder: Path) -> Parser:
    """Return the parser of ``.env``."""
    file = folder / ".env"

    def parse(body: bytes) -> object:
        file.write_bytes(body)
        return read_variables(file)

    return Parser((b"# a comment\nPREFECT_PORT=4200\nPASSWORD='a b'\n\n",), parse, is_json=False)


def table_files_manifest(folder: Path) -> Parser:
    """Return the parser of the manifest that ``recpress tables quantize`` writes."""
    result, body = _run_quantize(folder)

    def parse(changed: bytes) -> object:
        (result / "manifest.json").write_bytes(changed)
        return table_files.check(result)

    return Parser((body,), parse)


def table_files_plan(folder: Path) -> Parser:
    """Return the parser of ``tables.json``, the description of quantized tables."""
    result, _ = _run_quantize(folder)
    file = next(path for path in (result / "files").iterdir() if path.suffix == ".json")
    body = file.read_bytes()

    def parse(changed: bytes) -> object:
        file.chmod(0o644)
        file.write_bytes(changed)
        return table_files.check(result)

    return Parser((body,), parse)


def _publish_version(folder: Path) -> Finished:
    """Publish an order without running it, and return its record."""
    publish_version = import_module("triton_versions").publish_version  # in tests/tasks
    result: Finished = publish_version(folder, ORDER_DIGEST[0])
    return result


def _run_quantize(folder: Path) -> tuple[Path, bytes]:
    """Run ``recpress tables quantize``; return its output folder and the manifest."""
    draft = drafts.write_draft(folder / "draft", rows=ROWS)
    result = folder / "quantized"
    step = table_files.build_table_step("int8", {})
    table_files.quantize(draft / "model.safetensors", result, step)
    return result, (result / "manifest.json").read_bytes()


PARSERS: dict[str, Callable[[Path], Parser]] = {
    "model.json of a draft": draft_document,
    "model.json of a bundle": sealed_document,
    "header of safetensors": safetensors_header,
    "safetensors": safetensors_file,
    "parquet": parquet_file,
    "order": order_file,
    "limit": limit,
    "record": record,
    "record of an order": order_record,
    "report": report,
    "manifest of an artifact": artifact_manifest,
    "entry of a ledger": ledger_entry,
    "tags of a version": registry_tags,
    "config.pbtxt": triton_configuration,
    "docker-compose.yml": compose_file,
    ".env": env_file,
    "manifest of table files": table_files_manifest,
    "tables.json": table_files_plan,
}
