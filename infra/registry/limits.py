"""What a registry can store: lengths and characters of names, tags and sources.

Checked before MLflow is called, since its servers refuse some of it with a database's error.
"""

import re

from infra.errors import Refused

# The narrowest limits of MLflow's own checks and of the columns its SQL stores use.
MAX_NAME = 256
MAX_TAG_KEY = 250
MAX_TAG_VALUE = 100_000
MAX_SOURCE = 500
MAX_DESCRIPTION = 5_000
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[^/:'\"`\x00-\x1f]+")
_TAG_KEY = re.compile(r"[\w\-./: ]+")


def require_fit(model: str, order: str, source: str, tags: dict[str, str]) -> None:
    """Refuse what the registry cannot store of one version; raises ``Refused``."""
    require_name(model)
    require_order(order)
    if len(source) > MAX_SOURCE:
        raise Refused(
            f"The source has {len(source)} characters, the registry keeps {MAX_SOURCE}: "
            f"{source[:60]}... Use a store with a shorter root."
        )
    for name, value in tags.items():
        if not _TAG_KEY.fullmatch(name) or len(name) > MAX_TAG_KEY:
            raise Refused(
                f"Tag {name[:60]!r} is no name the registry takes: up to {MAX_TAG_KEY} letters, "
                "digits, spaces and _-./:"
            )
        if len(value) > MAX_TAG_VALUE:
            raise Refused(
                f"Tag {name!r} has {len(value)} characters, the registry keeps {MAX_TAG_VALUE}. "
                "Put it into the release and tag its digest."
            )


def require_name(model: str) -> None:
    """Refuse a model name that the registry does not take."""
    if not _NAME.fullmatch(model) or model.strip() != model or len(model) > MAX_NAME:
        raise Refused(
            f"{model[:60]!r} is no model name the registry takes: 1 to {MAX_NAME} characters, "
            "without / : and quotes."
        )


def require_order(order: str) -> None:
    """Refuse anything but the digest of an order: 64 hex digits."""
    if not _SHA256.fullmatch(order):
        raise Refused(f"An order's digest is 64 hex digits; found {order[:60]!r}.")


def shortened(text: str) -> str:
    """A description of at most the length that the registry stores."""
    return text if len(text) <= MAX_DESCRIPTION else text[: MAX_DESCRIPTION - 3] + "..."
