"""Limits on lengths and characters of the names, tags and sources that MLflow stores.

They are checked before MLflow is called, because its servers report some violations as database
errors. A source is the URI of a release, which is what is published for one order. The limits of an
order, on measurements, are in ``compressors/contracts/limits.py``.
"""

import re

from infra.errors import RegistryRefused

# In characters. Each is the smaller of the limit that MLflow checks and the width of the column in
# its SQL stores.
MAX_NAME = 256
MAX_TAG_KEY = 250
MAX_TAG_VALUE = 100_000
MAX_SOURCE = 500
MAX_DESCRIPTION = 5_000
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[^/:'\"`\x00-\x1f]+")
_TAG_KEY = re.compile(r"[\w\-./: ]+")


def require_fit(model: str, order: str, source: str, tags: dict[str, str]) -> None:
    """Raise ``RegistryRefused`` if the registry cannot store a field of one version.

    Args:
        model: the registered model's name; see ``require_name``.
        order: digest of the order; see ``require_order``.
        source: URI of the release, of at most ``MAX_SOURCE`` characters.
        tags: tags of the version. A name has 1 to ``MAX_TAG_KEY`` characters, which are letters,
            digits, spaces and ``_-./:``; a value has at most ``MAX_TAG_VALUE`` characters.
    """
    require_name(model)
    require_order(order)
    if len(source) > MAX_SOURCE:
        raise RegistryRefused(
            "source_too_long", got=len(source), most=MAX_SOURCE, source=source[:60]
        )
    for name, value in tags.items():
        if not _TAG_KEY.fullmatch(name) or len(name) > MAX_TAG_KEY:
            raise RegistryRefused("tag_name_invalid", tag=name[:60], most=MAX_TAG_KEY)
        if len(value) > MAX_TAG_VALUE:
            raise RegistryRefused(
                "tag_value_too_long", tag=name, got=len(value), most=MAX_TAG_VALUE
            )


def require_name(model: str) -> None:
    """Raise ``RegistryRefused`` unless ``model`` can be the name of a model.

    It has 1 to ``MAX_NAME`` characters, without ``/``, ``:``, quotes, backquotes and control
    characters, and without whitespace at its ends.
    """
    if not _NAME.fullmatch(model) or model.strip() != model or len(model) > MAX_NAME:
        raise RegistryRefused("model_name_invalid", name=model[:60], most=MAX_NAME)


def require_order(order: str) -> None:
    """Raise ``RegistryRefused`` unless ``order`` is a digest of 64 lowercase hex digits."""
    if not _SHA256.fullmatch(order):
        raise RegistryRefused("order_invalid", got=order[:60])


def shorten_description(text: str) -> str:
    """Shorten a description to the length that the registry stores."""
    return text if len(text) <= MAX_DESCRIPTION else text[: MAX_DESCRIPTION - 3] + "..."
