"""Why a layer, or channels of it, cannot be removed. The plan of a step lists these reasons."""

from typing import ClassVar

from compressors.contracts.coded_error import CodedError


class NotRemovable(CodedError):
    """Why a unit cannot be removed or made narrower."""

    @property
    def reason(self) -> str:
        """The sentence without its full stop, as a part of a line of the plan."""
        return str(self).rstrip(".")


class NotAWidth(NotRemovable):
    """Why a layer cannot become narrower."""

    sentences: ClassVar = {
        "shared_width_excluded": "shares {width} with {layer!r}: {reason}.",
        "channels_few": "{channels} channels: {share:.0%} of them, as a multiple of {multiple}, is "
        "no fewer.",
        "groups_few": "{groups} groups of channels ({width}): {share:.0%} of them, as a multiple "
        "of {multiple}, is no fewer.",
        "network_fails": "with {width} = {count} the network fails: {problem}.",
        "channels_read_elsewhere": "its channels are read past its layers: without some, scores "
        "are off by {gap}.",
        "channels_in_score": "the channels of {layer!r} reach the score without a dense layer.",
        "consumer_called_sometimes": "{consumer!r} is not called every time.",
        "channels_mixed_by": "{consumer!r} mixes the channels of {layer!r}.",
        "channels_mixed_before": "the channels of {layer!r} are mixed on their way to "
        "{consumer!r}.",
        "inputs_from_elsewhere": "not all inputs of {consumer!r} come from channels of one layer.",
        "consumer_rows_differ": "{consumer!r} is not called with one row per row.",
        "output_rows_differ": "{layer!r} does not return one row per row.",
        "channels_permuted": "{first!r} and {second!r} meet in {consumer!r} in different orders.",
        "tensors_differ": "another width does not build.",
        "already_quantized": "{layer!r} is already {format}: prune before quantizing.",
        "already_factored": "{layer!r} is already factored: prune before factorizing.",
        "other_size": "{argument} is also a size of {module!r}.",
        "not_between_layers": "{argument} is not the width between two layers.",
    }


class NotProportional(NotAWidth):
    """With another number no layer grows in proportion, or the network cannot be built."""

    sentences: ClassVar = {
        "not_built": "another width does not build.",
        "other_growth": "{layer!r} grows by other than {argument} does.",
        "not_between_layers": "{argument} is not the width between two layers.",
    }


class NotAMember(NotRemovable):
    """Why a layer of a stack cannot be removed."""

    sentences: ClassVar = {
        "rest_unfit": "what is left does not fit without layer {layer}: {problem}.",
        "other_network": "without layer {layer} it is another network than one that skips it "
        "(scores are off by {gap}).",
        "not_skippable": "layer {layer} cannot be skipped: its output is not its input.",
    }


class OtherConsumer(NotRemovable):
    """What consumes a layer's output other than layers and norms."""

    sentences: ClassVar = {
        "output_of_network": "its output leaves the network.",
        "output_of_operator": "its output goes into {operator}.",
    }
