"""List the model versions that recpress registered, including those with unexpected tags.

Every user with write access to the registry can create a version with any tags. A version with
unexpected tags is listed with a note; it does not prevent the listing of others.
"""

import json
import logging
import re

from compressors.contracts import Artifact, artifact_name
from infra.bundle.json_limits import check_limits
from infra.errors import Refused
from infra.registry.mlflow_registry import ORDER_TAG, RegisteredVersion, Registry
from infra.settings import load_settings
from infra.store.object_store import Store
from tasks.orchestration.workspace import store

log = logging.getLogger(__name__)

RECIPE_TAG = "recpress.recipe"
_REQUIRED_TAGS = ("recpress.outcome", "recpress.bundle")
"""Tags with the verdict, and with the bundle as ``name@version``."""

# Tags whose values are references to the store.
_REFERENCE_TAGS = re.compile(r"recpress\.(report|artifact\..*)")
# A reference: an artifact, or a file in it, with or without the store's root.
_REFERENCE = re.compile(
    r"(?P<uri>(?:.*/)?artifacts/[0-9a-f]{64})(?P<path>(?:/files/.*)?)", re.DOTALL
)


class ListedVersion(RegisteredVersion):
    """A registered version with the kinds of its recipe's steps.

    ``note`` describes unexpected tags; it is empty if there are none.
    """

    recipe: tuple[str, ...] = ()
    note: str = ""


def list_versions(model: str | None) -> tuple[ListedVersion, ...]:
    """List the versions of one model, or of all models, that have the tag of an order.

    Raises:
        RegistryRefused: there is no model of that name.
    """
    registry = Registry(load_settings().registry_uri)
    versions: list[RegisteredVersion] = []
    for name in [model] if model else registry.models():
        try:
            versions += registry.versions(name)
        except Refused as fault:
            if model:
                raise
            log.warning("Model %r is left out: %s", name, fault)
    release_store = store()
    return tuple(
        _describe_version(item, release_store) for item in versions if ORDER_TAG in item.tags
    )


def _describe_version(item: RegisteredVersion, release_store: Store) -> ListedVersion:
    """Return a version with full URIs, the kinds of its steps, and a note on unexpected tags."""
    notes = []
    recipe = _parse_recipe(item.tags.get(RECIPE_TAG))
    if recipe is None:
        notes.append(f"its tag {RECIPE_TAG} is not a list of steps")
    if not re.fullmatch(r"[0-9a-f]{64}", item.tags[ORDER_TAG]):
        notes.append(f"its tag {ORDER_TAG} is not an order's digest")
    notes += [f"it has no tag {tag}" for tag in _list_missing_tags(item.tags)]
    if artifact_name(item.source) is None:
        notes.append("its source is not an artifact of a store")
    fields = {
        **item.model_dump(),
        "source": _complete_uri(item.source, release_store),
        "tags": {
            name: _complete_uri(value, release_store) if _REFERENCE_TAGS.fullmatch(name) else value
            for name, value in item.tags.items()
        },
    }
    note = f"not as recpress registers it: {'; '.join(notes)}" if notes else ""
    return ListedVersion(**fields, recipe=recipe or (), note=note)


def _list_missing_tags(tags: dict[str, str]) -> list[str]:
    return [tag for tag in _REQUIRED_TAGS if not tags.get(tag)]


def _parse_recipe(text: str | None) -> tuple[str, ...] | None:
    """Parse the kinds of the steps in a recipe tag; None if it is not a recipe."""
    try:
        raw = (text or "").encode()
        check_limits(raw)
        steps = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    if not isinstance(steps, list) or not all(
        isinstance(step, dict) and isinstance(step.get("kind"), str) for step in steps
    ):
        return None
    return tuple(step["kind"] for step in steps)


def _complete_uri(text: str, release_store: Store) -> str:
    """Return a reference as a full URI; return text that is not a reference unchanged."""
    match = _REFERENCE.fullmatch(text)
    sha256 = None if match is None else artifact_name(match["uri"])
    if match is None or sha256 is None:
        return text
    artifact = Artifact(uri=match["uri"], sha256=sha256, bytes=0)  # ``uri_of`` reads no bytes
    return release_store.uri_of(artifact) + match["path"]
