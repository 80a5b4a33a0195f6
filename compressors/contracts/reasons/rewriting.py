"""Reasons about steps that rewrite weights: folding norms, and scaling inputs and outputs.

``SENTENCES`` maps the code of a reason to its sentence, in the syntax of ``str.format``.
``Reason`` in ``reason.py`` fills in the fields in braces.

Folding includes the factors of a norm in the weights, and its offsets in the bias, of a dense layer
next to it. Scaling multiplies the inputs of a layer by factors and divides the outputs of the layer
before by them.
A dead channel is an output of a layer that is constant or that no other layer uses.
The affine part of a norm is its learned factors and offsets. A field ``producer`` names a layer
whose outputs are scaled or removed, ``consumer`` a layer that reads them, and ``width`` the
argument of the model class that sets the number of channels. A sentence without a subject is about
the layer of the decision.
"""

SENTENCES = {
    "norm_folded": "{step}: its weights and bias include the factors and offsets of {norm}",
    "dead_channels": "{step}: removes {count} of {channels} channels, which are dead ({width})",
    "dead_inputs": "{step}: inputs removed with the outputs of {producers}",
    "constant_channels": "{step}: removes channels that are constant on {rows:,} rows, "
    "if there are any",
    "nothing_to_fold": "has no norm to fold and no dead channel",
    "norm_kept": "{norm} is kept: {why}",
    "norm_without_statistics": "{norm} has no running statistics",
    "norm_of_places": (
        "the input of {norm} has positions after its channels: (rows, channels, positions)"
    ),
    "norm_of_more": "{norm} normalizes over other dimensions than the channels, too",
    "norm_without_affine": "{norm} has no affine part",
    "norm_already_folded": "the affine part of {norm} is already folded",
    "norm_without_channel_affine": "{norm} has no affine part for each channel",
    "no_single_neighbor": (
        "is not folded: there is not exactly one dense layer before it, and not all layers after "
        "it are dense"
    ),
    "nonlinear_output": "a nonlinearity follows its output",
    "not_float_linear": "{layer} is not a float32 Linear",
    "layer_fixed": "{layer} cannot be changed: {why}",
    "no_bias_for_offset": ("{layer} has no bias that could include the offset of the norm"),
    "columns_unread": "all weights for its columns {columns} are zero",
    "input_columns_unread": "all weights for columns {columns} of input {input!r} are zero",
    # factors
    "inputs_scaled": (
        "{step}: inputs are multiplied by factors, outputs of {producer} divided by them"
    ),
    "outputs_scaled": (
        "{step}: outputs are multiplied by factors, inputs of {consumers} divided by them"
    ),
    "not_scalable": "no layer or norm before it can be divided by the same factors",
    "output_unread": "no layer reads its output",
    "is_norm": "{norm} is a norm: apply 'fold' before this step",
    "not_linear_or_norm": "{module} is neither a Linear nor a norm",
    "consumer_is_norm": (
        "{consumer}, which reads its output, is a norm: apply 'fold' before this step"
    ),
    "consumer_not_linear": "{consumer}, which reads its output, is not a Linear",
    # dataflow
    "called_again": "is called more than once",
    "not_called": "is not called in the served graph",
    "shares_tensor": "shares a tensor with {other!r}",
    "weight_read_elsewhere": "code outside of the layer reads its weight",
    "consumer_fixed": "{consumer!r}, which reads its output, cannot be changed: {why}",
    "output_leaves": "its output is an output of the network",
    "output_enters": "operator {operator} reads its output",
}
