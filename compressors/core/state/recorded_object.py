"""An argument of a network's class of which only the reads of the constructor are known.

Some constructors receive a large object, such as a data set, and read a few numbers from it.
``infra/bundle/recorded_reads.py`` records the results when a draft is written (the folder that
becomes a bundle when it is packed), and a bundle stores them in place of the object
(``contracts/network.py``).
"""

from collections.abc import Mapping
from typing import Any

from compressors.contracts.network import Reads


class RecordedObject:
    """Returns what the original object returned; any other read raises an error."""

    __iter__ = None  # otherwise Python iterates over [0], [1], ...

    def __init__(self, reads: Reads) -> None:
        """``reads`` has the values that a constructor received, not their descriptions."""
        self.__reads = reads

    def __getattr__(self, name: str) -> Any:
        # The private attribute is missing while the object is copied.
        if name.startswith("_RecordedObject__") or name not in self.__reads.attributes:
            raise AttributeError(_build_not_recorded(f"the attribute {name!r}"))
        return self.__reads.attributes[name]

    def __getitem__(self, key: Any) -> Any:
        if key not in self.__reads.items:
            raise KeyError(_build_not_recorded(f"the key {key!r}"))
        return self.__reads.items[key]

    def __contains__(self, key: Any) -> bool:
        if key not in self.__reads.contains:
            raise KeyError(_build_not_recorded(f"whether it contains {key!r}"))
        return self.__reads.contains[key]

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        requested = _convert_tuples_to_lists([arguments, keywords])
        for call in self.__reads.calls:
            if _convert_tuples_to_lists([call.arguments, call.keywords]) == requested:
                return call.value
        raise TypeError(_build_not_recorded(f"a call with {arguments} and {keywords}"))


def _build_not_recorded(read: str) -> str:
    return (
        f"expected a read that the constructor made when the draft was written, got {read}. Write "
        "the draft again"
    )


def _convert_tuples_to_lists(value: Any) -> Any:
    """Return a value with lists in place of tuples, as in JSON."""
    if isinstance(value, list | tuple):
        return [_convert_tuples_to_lists(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _convert_tuples_to_lists(item) for key, item in value.items()}
    return value
