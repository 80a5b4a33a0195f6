"""Reasons about channels, weights and layers that a step removes, or cannot remove.

``SENTENCES`` maps the code of a reason to its sentence, in the syntax of ``str.format``.
``Reason`` in ``reason.py`` fills in the fields in braces.

A field ``width`` or ``argument`` names the argument of the model class that sets the size of the
layers. A field ``producer`` names the layer that outputs the channels, ``consumer`` a module that
they reach. A field ``why``, ``what`` or ``fault`` contains other reasons or the message of an
error. A field ``importance`` names the criterion by which a step selects what it removes. If an
argument counts groups of channels, such as attention heads, whole groups are removed, and
``units_before`` and ``units_after`` are the numbers of groups. ``part`` is "weight" or "channel",
``gap`` the largest difference of a score, and ``change`` the change of a metric.
"""

SENTENCES = {
    # weights
    "zeros_of_layer": "{step}: sets the smallest {share:.0%} of its weights to zero",
    "zeros_of_all_layers": "{step}: sets the smallest {share:.0%} of all dense weights to zero",
    "two_of_four": (
        "{step}: two of every four weights are zero; TensorRT is faster if it selects "
        "sparse kernels, ONNX Runtime is not faster"
    ),
    "inputs_not_multiple": "its number of inputs ({inputs}) is not a multiple of 4",
    "reconstruction_error": "refitting reduces the output error to {share:.0%}",
    "penalty": "penalty {strength:g} on every {part}",
    "single_output": "has a single output, which cannot be removed",
    "zeros": "{share:.1%} of its weights are zero, stored like other weights",
    "zero_outputs": "{count} of {outputs} outputs are zero",
    # channels
    "fewer_channels": "{before} -> {after} outputs ({width})",
    "fewer_groups": "{before} -> {after} outputs ({width} {units_before} -> {units_after})",
    "channels_cut": "{step}: {what} by {importance}",
    "one_threshold": (
        "{step}: fewer outputs ({width}) by {importance}, with one threshold for all layers"
    ),
    "multiply_adds_left": "keeps {share:.1%} of the multiply-adds of all dense layers",
    "in_rounds": "in {rounds} rounds",
    "inputs_follow": "inputs removed with the outputs of {producers}",
    "trained_each_round": "trained after each round",
    "last_round": "in the last round: {what}",
    "shares_width": "shares {width} with {layer!r}: {why}",
    "no_fewer_channels": (
        "{share:.0%} of its {channels} channels, rounded to a multiple of {multiple}, "
        "would not be fewer"
    ),
    "no_fewer_groups": (
        "{share:.0%} of its {groups} groups of channels ({width}), rounded to a "
        "multiple of {multiple}, would not be fewer"
    ),
    # widths of a configuration
    "one_output": "has a single output",
    "no_width_argument": "no argument of the model class sets its width of {outputs}",
    "split_width": (
        "no layer grows with {argument}; for example, the class may split one width among heads"
    ),
    "width_not_built": "the network cannot be built with another width",
    "prune_before_quantizing": "{module!r} is already {format}: prune before quantizing",
    "prune_before_factorizing": "{module!r} is already factored: prune before factorizing",
    "size_of_other": "{argument} also sets a size of {module!r}",
    "grows_differently": "{module!r} does not grow in proportion to {argument}",
    "not_between_layers": (
        "{argument} is not both an output width of a layer and an input width of another"
    ),
    # consumers of channels
    "channels_reach_score": (
        "the channels of {producer!r} reach the score without another dense layer"
    ),
    "not_always_called": "{consumer!r} is not called for every batch",
    "channels_mixed": "{consumer!r} mixes the channels of {producer!r}",
    "mixed_before_consumer": (
        "the channels of {producer!r} are mixed before they reach {consumer!r}"
    ),
    "inputs_not_matched": "some inputs of {consumer!r} are not outputs of these channels",
    "called_with_other_rows": "{layer!r} is not called with one row for each row of the batch",
    "returns_other_rows": "{producer!r} does not return one row for each row of the batch",
    "channels_differ": (
        "the channels of {first!r} and {second!r} are combined in {consumer!r}, but not one to one"
    ),
    "narrower_fails": "the network fails with {width} = {count}: {fault}",
    "channels_read": (
        "code outside of the layers reads its channels: without some of them, scores "
        "differ by {gap}"
    ),
    # layers
    "no_layer_count": "no argument of the model class counts or lists this layer",
    "layers_dropped": "{step}: removes {count} of {members} layers ({argument}) by {importance}",
    "shares_count": "shares {argument} with {layer!r}: {why}",
    "treated_differently": (
        "earlier steps changed the layers of {argument} in different ways: move 'drop_layers' first"
    ),
    "rest_does_not_fit": "the other layers do not fit together without layer {layer}: {fault}",
    "not_the_skipping_network": (
        "the network without layer {layer} differs from the one that skips it (scores differ by "
        "{gap})"
    ),
    "cannot_be_skipped": (
        "layer {layer} cannot be skipped: neither its input nor zeros can replace its output"
    ),
    "layer_kept": "layer {layer} is kept: {metric} {change:+.5f} without it",
    "layer_removed": "layer {layer} is removed",
    "layer_removed_measured": "layer {layer} is removed: {metric} {change:+.5f} without it",
    "place_removed": "no layer has this name after the step",
    "moved_from": "was layer {layer} before the step",
}
