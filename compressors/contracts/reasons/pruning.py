"""Sentences about channels, weights and layers that are removed."""

SENTENCES = {
    # weights
    "zeros_of_layer": "{step}: {share:.0%} zeros, its smallest weights",
    "zeros_of_all_layers": "{step}: {share:.0%} zeros, the smallest of all layers",
    "two_of_four": (
        "{step}: two zeros among every four inputs, fewer products where TensorRT picks sparse "
        "kernels, no gain in ONNX Runtime"
    ),
    "inputs_not_multiple": "{inputs} inputs, no multiple of 4",
    "reconstruction_error": "reconstruction leaves {share:.0%} of the error",
    "penalty": "penalty {strength:g} on every {part}",
    "single_output": "has a single output, which has to stay",
    "zeros": "{share:.1%} zeros, stored like other weights",
    "zero_outputs": "{count} of {outputs} outputs are zero",
    # channels
    "fewer_channels": "{before} -> {after} outputs ({width})",
    "fewer_groups": "{before} -> {after} outputs ({width} {units_before} -> {units_after})",
    "channels_cut": "{step}: {what} by {importance}",
    "one_threshold": (
        "{step}: fewer outputs ({width}) by {importance}, one threshold for all layers"
    ),
    "multiply_adds_left": "{share:.1%} of all dense multiply-adds stay",
    "in_rounds": "in {rounds} rounds",
    "inputs_follow": "inputs follow {makers}",
    "trained_each_round": "trained after each round",
    "last_round": "in the last round {what}",
    "shares_width": "shares {width} with {layer!r}: {why}",
    "no_fewer_channels": (
        "{channels} channels: {share:.0%} of them, as a multiple of {multiple}, is no fewer"
    ),
    "no_fewer_groups": (
        "{groups} groups of channels ({width}): {share:.0%} of them, as a multiple of {multiple}, "
        "is no fewer"
    ),
    # widths of a configuration
    "one_output": "has a single output",
    "no_width_argument": "no number of the architecture's configuration is its width {outputs}",
    "split_width": ("nothing grows with {argument}, as where a class splits one width among heads"),
    "width_not_built": "another width does not build",
    "prune_before_quantizing": "{module!r} is already {format}: prune before quantizing",
    "prune_before_factorizing": "{module!r} is already factored: prune before factorizing",
    "size_of_other": "{argument} is also a size of {module!r}",
    "grows_differently": "{module!r} does not grow in proportion to {argument}",
    "not_between_layers": "{argument} is not the width between two layers",
    # consumers of channels
    "channels_reach_score": "the channels of {maker!r} reach the score without a dense layer",
    "not_always_called": "{reader!r} is not called every time",
    "channels_mixed": "{reader!r} mixes the channels of {maker!r}",
    "mixed_before_reader": "the channels of {maker!r} are mixed on their way to {reader!r}",
    "inputs_of_several": "not all inputs of {reader!r} come from channels of one layer",
    "called_with_other_rows": "{layer!r} is not called with one row for each row of the batch",
    "returns_other_rows": "{maker!r} does not return one row for each row of the batch",
    "channels_differ": "{first!r} and {second!r} reach {reader!r} in different channels",
    "narrower_fails": "with {width} = {count} the network fails: {fault}",
    "channels_read": (
        "its channels are read outside of its layers: without some, scores are off by {gap}"
    ),
    # layers
    "no_layer_count": ("no number or list of the architecture's configuration counts this layer"),
    "layers_dropped": "{step}: {count} of {members} layers ({argument}) by {importance}",
    "shares_count": "shares {argument} with {layer!r}: {why}",
    "treated_differently": (
        "earlier steps treat the layers of {argument} differently: drop layers first"
    ),
    "rest_does_not_fit": "the rest does not fit without layer {layer}: {fault}",
    "not_the_skipping_network": (
        "without layer {layer} it is another network than one that skips it (scores are off by "
        "{gap})"
    ),
    "cannot_be_skipped": (
        "layer {layer} cannot be skipped: neither its input nor zeros can replace its output"
    ),
    "layer_kept": "layer {layer} stays, {metric} {change:+.5f} without it",
    "layer_removed": "layer {layer} is removed",
    "layer_removed_measured": "layer {layer} is removed, {metric} {change:+.5f} without it",
    "place_removed": "no layer has this name any more",
    "moved_from": "this was layer {layer}",
}
