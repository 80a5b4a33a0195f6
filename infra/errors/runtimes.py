"""Errors of runtimes: graphs that they refuse, engines that fail their audit.

``sentences`` of a class maps the code of each error to its message, with the fields in braces (see
``infra/errors/__init__.py``).

Fields whose names do not explain them:

- ``problem``: the message of another error, or of the library's log.
- A profile is TensorRT's range of shapes for an input: ``low`` to ``high``.
- ``packed_bytes``: the bytes of all weights in the plan. ``line``: the missing line of the log.
- ``twin_bytes``: the scratch memory of a second engine, which has half of the table's rows.
"""

from typing import ClassVar

from infra.errors.base import InfraError, Refused


class ScoringFailed(InfraError):
    """ONNX Runtime failed on inputs, or did not accept them."""

    sentences: ClassVar = {
        "scoring_failed": "ONNX Runtime failed while scoring: {problem}",
        "inputs_refused": "ONNX Runtime does not accept these inputs: {problem}",
    }


class BuildRefused(Refused):
    """An engine could not be built from this graph, or failed its audit."""

    sentences: ClassVar = {
        "onnxruntime_graph_refused": "ONNX Runtime does not accept {file}: {problem}",
        "tensorrt_missing": "target {target!r} needs TensorRT, which cannot be imported here "
        "({problem}). Run \"pip install 'recpress[{target}]'\" to install it.",
        "builder_missing": "TensorRT {version} has no builder on this machine: {problem} The "
        "datacenter builder needs a GPU like the one that will serve the engine.",
        "graph_missing": "there is no ONNX file {path}.",
        "tensorrt_graph_refused": "TensorRT {version} refuses the graph: {problem}",
        "layer_type_unknown": "layer {layer} has outputs of type {type}, which the audit does not "
        "support.",
        "profiles_missing": "input(s) {inputs} have dynamic dimensions and need a profile each.",
        "profile_input_unknown": "there is a profile for {input!r}, which is not an input of the "
        "graph; it has {inputs}.",
        "profile_shape_differs": "the profile of {input!r} covers shapes ({low}) to ({high}), but "
        "the input's shape is ({shape}), where -1 is any size.",
        "profiles_refused": "TensorRT {version} refuses the profiles: {problem}",
        "engine_not_built": "TensorRT {version} built no engine: {problem}",
        "log_line_missing": "the log of TensorRT {version} has no line {line!r}, so the engine "
        "cannot be audited. Use a version named in docs/tensorrt.md.",
        "weights_widened": "the engine has {weights_bytes:,} bytes of weights. The plan stores "
        "{packed_bytes:,}, and at most {most_bytes:,} are allowed, so a table or layer was "
        "converted to a wider type. Bytes of the graph's constants by type: {constants}.",
        "scratch_grows": "a whole table is converted to a wider type before its Gather: the engine "
        "needs {scratch_bytes:,} bytes of scratch memory, and {twin_bytes:,} with half the rows. "
        "Gather the rows first, then convert them.",
        "initializer_missing": "Expected table {table!r} in initializer {initializer!r}, which the "
        "graph does not have; the audit cannot find the table.",
        "initializer_rows_differ": "Expected {expected} rows in initializer {initializer!r} of "
        "table {table!r}, got shape ({shape}).",
        "initializer_length_missing": "the data of initializer {initializer!r} is in an external "
        "file, but the graph does not state its length.",
        "request_refused": "{problem}",
    }
