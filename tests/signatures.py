"""Change the output of a signature, and convert documents to schema version 1."""

from typing import Any

from compressors.contracts import Signature


def replace_output(signature: Signature, **changes: Any) -> Signature:
    """Return a copy of a signature with other fields of its only output, without validation."""
    output = signature.single_output.model_copy(update=changes)
    return signature.model_copy(update={"outputs": (output,)})


def as_version_1(document: dict[str, Any]) -> dict[str, Any]:
    """Convert a ``model.json`` from version 2 to version 1.

    Version 1 had no name of the output and no ``fields`` and ``more_tables`` of inputs.
    """
    signature = dict(document["signature"])
    signature["inputs"] = [
        {name: value for name, value in item.items() if name not in ("fields", "more_tables")}
        for item in signature["inputs"]
    ]
    (output,) = signature.pop("outputs")
    signature |= {"task": output["kind"], "output": output["form"], "metric": output["metric"]}
    if "label" in output:
        signature["label"] = output["label"]
    return document | {"schema_version": 1, "signature": signature}
