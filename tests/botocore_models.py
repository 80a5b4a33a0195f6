"""botocore reads S3's description for each new client: most of the processor time of an S3 test."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from botocore.loaders import JSONFileLoader


@contextmanager
def models_read_once() -> Iterator[None]:
    """Inside, every client is made from the descriptions that the first one read."""
    read = JSONFileLoader.load_file
    reader = JSONFileLoader()
    known = functools.cache(functools.partial(read, reader))

    def load_file(self: JSONFileLoader, file_path: str) -> object:
        return known(file_path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JSONFileLoader, "load_file", load_file)
        yield
