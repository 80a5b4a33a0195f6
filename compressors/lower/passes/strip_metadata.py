"""Remove the exporter's metadata, such as a stack trace for each node, from a graph."""

import onnx_ir as ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass


class StripMetadata(ir.passes.InPlacePass):
    """Remove the metadata of the model, its graph, nodes and values.

    In a graph of a small model, metadata can take more bytes than the weights. Differs from
    onnx_ir's ``ClearMetadataAndDocStringPass``, which does not clear the model and values.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Remove the metadata of a model in place."""
        modified = bool(ClearMetadataAndDocStringPass()(model).modified)
        outputs = [value for node in model.graph.all_nodes() for value in node.outputs]
        values = (*model.graph.inputs, *model.graph.initializers.values(), *outputs)
        for holder in (model, model.graph, *values):
            modified |= bool(holder.metadata_props)
            holder.metadata_props.clear()
        return ir.passes.PassResult(model, modified=modified)
