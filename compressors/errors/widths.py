"""Exceptions with the reason why a layer, or channels of it, cannot be removed."""

from compressors.contracts.reasons import Reason


class NotRemovable(Exception):
    """A unit cannot be removed or made narrower.

    Attributes:
        reason: why it cannot; the reason appears in the step's plan.
    """

    def __init__(self, reason: Reason) -> None:
        """Create an exception with a reason."""
        super().__init__(str(reason))
        self.reason = reason


class NotAWidth(NotRemovable):
    """A layer cannot become narrower."""


class NotProportional(NotAWidth):
    """A width argument of the class cannot change: layers do not grow with it in proportion.

    Also raised if the network cannot be built with another value of the argument.
    """


class NotAMember(NotRemovable):
    """A layer in a stack of repeated layers cannot be removed."""


class OtherConsumer(NotRemovable):
    """An operator that is neither a layer nor a norm consumes a layer's output."""
