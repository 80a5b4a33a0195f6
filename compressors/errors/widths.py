"""Exceptions with the reason why a layer, or some of its channels, cannot be removed.

They are always caught inside ``compressors``; the reason becomes part of a step's plan.
"""

from compressors.contracts.reasons import Reason


class NotRemovable(Exception):
    """The base class: a layer cannot be removed or made narrower (with fewer channels).

    Attributes:
        reason: why the layer cannot be removed or made narrower.
    """

    def __init__(self, reason: Reason) -> None:
        """Create an exception with a reason."""
        super().__init__(str(reason))
        self.reason = reason


class NotAWidth(NotRemovable):
    """A layer cannot be made narrower."""


class NotProportional(NotAWidth):
    """A width argument of the model class cannot change.

    Raised if the sizes of layers do not grow in proportion to the argument, or if the network
    cannot be built with another value of it.
    """


class NotAMember(NotRemovable):
    """A layer cannot be removed from its stack (layers that the class builds in a loop)."""


class OtherConsumer(NotRemovable):
    """An operator that is neither a dense layer nor a norm reads the output of a layer."""
