"""Sentences about norms and factors that move between layers, and about dataflow."""

SENTENCES = {
    "norm_folded": "{step}: includes the factors and offsets of {norm}",
    "dead_channels": "{step}: removes {count} dead of {channels} channels ({width})",
    "dead_inputs": "{step}: inputs follow {makers}",
    "constant_channels": "{step}: removes channels that are constant on {rows:,} rows, if any",
    "nothing_to_fold": "has no norm to fold and no dead channel",
    "norm_kept": "{norm} stays: {why}",
    "norm_without_statistics": "{norm} has no running statistics",
    "norm_of_places": (
        "the input of {norm} has positions after channels: (rows, channels, positions)"
    ),
    "norm_of_more": "{norm} normalizes over more dimensions than the channels",
    "norm_without_affine": "{norm} has no affine part",
    "norm_already_folded": "the affine part of {norm} is already folded",
    "norm_without_channel_affine": "{norm} has no affine part for each channel",
    "no_single_neighbor": "neither only one dense layer before it nor only dense layers after it",
    "nonlinear_output": "a nonlinearity follows its output",
    "not_float_linear": "{layer} is not a float32 Linear",
    "layer_not_free": "{layer}: {why}",
    "no_bias_for_offset": ("{layer} has no bias that could include the offset of the norm"),
    "columns_unread": "all weights for its columns {columns} are zero",
    "input_columns_unread": "all weights for columns {columns} of input {input!r} are zero",
    # factors
    "inputs_scaled": "{step}: inputs are scaled, outputs of {maker} inversely",
    "outputs_scaled": "{step}: outputs are scaled, inputs of {readers} inversely",
    "not_scalable": "no layer or norm before it can be scaled with it",
    "output_unread": "no layer uses its output",
    "is_norm": "{norm} is a norm: apply 'fold' first",
    "not_linear_or_norm": "{module} is neither a Linear nor a norm",
    "reader_is_norm": "its output goes into {reader}, a norm: apply 'fold' first",
    "reader_not_linear": "its output goes into {reader}, which is not a Linear",
    # dataflow
    "called_again": "is called more than once",
    "not_called": "is not called in the served graph",
    "shares_tensor": "shares a tensor with {other!r}",
    "weight_read_elsewhere": "code outside of the layer reads its weight",
    "reader_closed": "its output goes into {reader!r}, which cannot change: {why}",
    "output_leaves": "its output is an output of the network",
    "output_enters": "its output goes into {operator}",
}
