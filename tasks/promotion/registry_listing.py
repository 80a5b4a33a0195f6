"""List our versions in the registry, including those with unexpected tags.

Every user with write access can register any version. An unexpected version is listed with a note,
and the others are still listed.
"""

import json
import logging
import re

from compressors.contracts import Artifact, artifact_name
from infra.bundle.json_limits import check_limits
from infra.errors import Refused
from infra.registry.mlflow_registry import ORDER_TAG, Registered, Registry
from infra.settings import load_settings
from infra.store.object_store import Store
from tasks.orchestration.workspace import store

log = logging.getLogger(__name__)

RECIPE_TAG = "recpress.recipe"

_REFERENCES = re.compile(r"recpress\.(report|artifact\..*)")
_IN_ARTIFACT = re.compile(
    r"(?P<uri>(?:.*/)?artifacts/[0-9a-f]{64})(?P<path>(?:/files/.*)?)", re.DOTALL
)


class ListedVersion(Registered):
    """A registered version; ``note`` describes what is unexpected about it."""

    recipe: tuple[str, ...] = ()
    note: str = ""


def listed(model: str | None) -> tuple[ListedVersion, ...]:
    """List our versions of one model or of all models, without those of other programs.

    Raises:
        RegistryRefused: there is no model of that name.
    """
    registry = Registry(load_settings().registry_uri)
    found: list[Registered] = []
    for name in [model] if model else registry.models():
        try:
            found += registry.versions(name)
        except Refused as fault:
            if model:
                raise
            log.warning("Model %r is left out: %s", name, fault)
    here = store()
    return tuple(_listed(item, here) for item in found if ORDER_TAG in item.tags)


def _listed(item: Registered, here: Store) -> ListedVersion:
    notes = []
    recipe = _recipe(item.tags.get(RECIPE_TAG))
    if recipe is None:
        notes.append(f"its tag {RECIPE_TAG} is not a list of steps")
    if not re.fullmatch(r"[0-9a-f]{64}", item.tags[ORDER_TAG]):
        notes.append(f"its tag {ORDER_TAG} is not an order's digest")
    notes += [f"it has no tag {tag}" for tag in _missing(item.tags)]
    if artifact_name(item.source) is None:
        notes.append("its source is not an artifact of a store")
    known = {
        **item.model_dump(),
        "source": _whole(item.source, here),
        "tags": {
            name: _whole(value, here) if _REFERENCES.fullmatch(name) else value
            for name, value in item.tags.items()
        },
    }
    note = f"not as recpress registers it: {'; '.join(notes)}" if notes else ""
    return ListedVersion(**known, recipe=recipe or (), note=note)


def _missing(tags: dict[str, str]) -> list[str]:
    return [tag for tag in ("recpress.outcome", "recpress.bundle") if not tags.get(tag)]


def _recipe(text: str | None) -> tuple[str, ...] | None:
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


def _whole(text: str, here: Store) -> str:
    """Prefix an artifact reference with the store's root; return any other text unchanged."""
    found = _IN_ARTIFACT.fullmatch(text)
    name = None if found is None else artifact_name(found["uri"])
    if found is None or name is None:
        return text
    return here.uri_of(Artifact(uri=found["uri"], sha256=name, bytes=0)) + found["path"]
