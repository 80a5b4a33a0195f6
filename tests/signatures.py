"""Signatures with another output, and documents as schema version 1 wrote them."""

from typing import Any

from compressors.contracts import Signature


def with_output(signature: Signature, **changes: Any) -> Signature:
    """A signature whose only output has other fields; nothing is validated."""
    output = signature.single_output.model_copy(update=changes)
    return signature.model_copy(update={"outputs": (output,)})


def as_version_1(document: dict[str, Any]) -> dict[str, Any]:
    """A ``model.json`` of version 2 in the form of version 1, which had no name of the output."""
    signature = dict(document["signature"])
    (output,) = signature.pop("outputs")
    signature |= {"task": output["kind"], "output": output["form"], "metric": output["metric"]}
    if "label" in output:
        signature["label"] = output["label"]
    return document | {"schema_version": 1, "signature": signature}
