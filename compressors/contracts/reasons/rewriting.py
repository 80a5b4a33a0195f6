"""Sentences about norms and factors that move between layers, and about dataflow."""

SENTENCES = {
    "norm_folded": "{step}: includes {norm}",
    "dead_channels": "{step}: {count} of {channels} channels are dead ({width})",
    "dead_inputs": "{step}: inputs follow {makers}",
    "constant_channels": "{step}: channels that are constant on {rows:,} rows",
    "nothing_to_fold": "no norm to fold, no dead channel",
    "norm_kept": "{norm} stays: {why}",
    "norm_without_statistics": "{norm} has no running statistics",
    "norm_of_places": "{norm} normalizes (rows, channels, places)",
    "norm_of_more": "{norm} normalizes more than channels",
    "norm_without_affine": "{norm} has no affine part",
    "norm_already_folded": "{norm} has no affine part any more",
    "norm_without_channel_affine": "{norm} has no affine part for each channel",
    "no_single_neighbor": "no dense layer is its only neighbor",
    "nonlinear_output": "its output passes a nonlinearity before it is read",
    "not_float_linear": "{layer} is no float32 Linear",
    "layer_not_free": "{layer}: {why}",
    "no_bias_for_offset": (
        "{layer} has no bias for the offset of the norm, and its class builds it without one"
    ),
    "columns_unread": "no weight reads its columns {columns}",
    "input_columns_unread": "no weight reads columns {columns} of input {input!r}",
    # factors
    "inputs_scaled": "{step}: inputs scaled with {maker}",
    "outputs_scaled": "{step}: outputs scaled for {readers}",
    "not_scalable": "no layer or norm whose factors pass through feeds it",
    "output_unread": "nothing reads it",
    "is_norm": "{norm} is a norm: fold it first",
    "not_linear_or_norm": "{module} is no Linear and no norm",
    "reader_is_norm": "{reader}, which reads it, is a norm: fold it first",
    "reader_not_linear": "{reader}, which reads it, is no Linear",
    # dataflow
    "called_again": "is called more than once",
    "not_called": "is not called in the graph that is served",
    "shares_tensor": "shares a tensor with {other!r}",
    "weight_read_elsewhere": "has a weight that other code reads",
    "reader_closed": "{reader!r}, which reads it, {why}",
    "output_leaves": "its output leaves the network",
    "output_enters": "its output goes into {operator}",
}
