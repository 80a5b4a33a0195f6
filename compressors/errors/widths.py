"""Exceptions that carry the reason why a layer, or channels of it, cannot be removed."""

from compressors.contracts.reasons import Reason


class NotRemovable(Exception):
    """A unit cannot be removed or made narrower.

    Attributes:
        reason: why not; the plan of a step lists it.
    """

    def __init__(self, reason: Reason) -> None:
        """Create an exception that carries a reason."""
        super().__init__(str(reason))
        self.reason = reason


class NotAWidth(NotRemovable):
    """A layer cannot become narrower."""


class NotProportional(NotAWidth):
    """With another number no layer grows in proportion, or the network cannot be built."""


class NotAMember(NotRemovable):
    """A layer of a stack cannot be removed."""


class OtherConsumer(NotRemovable):
    """Something other than layers and norms consumes a layer's output."""
