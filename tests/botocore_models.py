"""Cache botocore's service descriptions, whose loading takes most of the CPU time of S3 tests."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from botocore.loaders import JSONFileLoader


@contextmanager
def models_read_once() -> Iterator[None]:
    """Within this context, botocore reads each service description only once."""
    original = JSONFileLoader.load_file
    reader = JSONFileLoader()
    load_once = functools.cache(functools.partial(original, reader))

    def load_file(self: JSONFileLoader, file_path: str) -> object:
        return load_once(file_path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JSONFileLoader, "load_file", load_file)
        yield
