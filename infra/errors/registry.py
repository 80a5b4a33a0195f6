"""Errors of the model registry, of promotion, and of a Triton repository.

``sentences`` of a class maps the code of each error to its message, with the fields in braces (see
``infra/errors/__init__.py``).

Fields whose names do not explain them:

- ``order``, ``expected`` and ``got`` with ``:.12``: the first digits of an order's digest.
- ``most``: the most characters allowed. ``got``: their number, or the wrong value.
- ``problem``: the message of another error, or a clause. ``reasons``: the reasons of the verdicts.
- ``stated``: the outcome in the report. ``computed``: the outcome of its targets' verdicts.
- ``by``: the person or program that wrote the ledger entry.

The ledger is the list of a model's promotions and rollbacks in the store.
"""

from typing import ClassVar

from infra.errors.base import InfraError, Refused


class RegistryUnavailable(InfraError):
    """The model registry failed."""

    sentences: ClassVar = {
        "registry_no_answer": "The registry did not respond: {problem}",
        "registry_file_unreadable": "The registry {file} cannot be read: {problem}.",
        "registry_file_locked": "The registry {file} is in use by another program ({problem}). Try "
        "again.",
        "created_version_missing": "Version {version} of {model!r} was created and cannot be "
        "found; it may have been deleted in the meantime. Run again.",
    }


class RegistryOutage(RegistryUnavailable):
    """A remote registry did not respond, or responded with a server error."""

    sentences: ClassVar = {"registry_no_answer": "The registry did not respond: {problem}"}


class RegistryRefused(Refused):
    """The registry has no such model, version or alias, or cannot store an entry."""

    sentences: ClassVar = {
        "model_missing": "There is no model {model!r} in the registry; there are: {models}.",
        "version_missing": "{model!r} has no version {version!r}; the newest are {newest}. Give "
        "a version number or @alias.",
        "alias_missing": "{model!r} has no alias {alias!r}; it has {aliases}. (Only an accepted "
        "result becomes @candidate.) Give a version number instead; the newest are {newest}.",
        "model_name_invalid": "Expected a model name of 1 to {most} characters without / : and "
        "quotes, got {name!r}.",
        "order_invalid": "Expected an order's digest of 64 hex digits, got {got!r}.",
        "source_too_long": "The source has {got} characters, and the registry stores at most "
        "{most}: {source}... Use a store with a shorter root.",
        "source_is_local": "An MLflow server accepts no local folder as a model's source, since "
        "its readers could not reach it. Set RECPRESS_STORE to s3://bucket/prefix.",
        "tag_name_invalid": "Expected a tag name of up to {most} letters, digits, spaces and "
        "_-./:, got {tag!r}.",
        "tag_value_too_long": "Tag {tag!r} has {got} characters, and the registry stores at most "
        "{most}. Put it into the release and tag its digest.",
        "registry_refused": "The registry refused the request: {problem}",
    }


class TritonRefused(Refused):
    """A Triton folder belongs to another program, or a graph cannot be configured for Triton."""

    sentences: ClassVar = {
        "configuration_foreign": "{path} was not written by recpress, so it is not changed. Move "
        "it away or choose another repository.",
        "configuration_impossible": "{model} version {version}, {target}: it cannot be configured "
        "for Triton ({problem}).",
        "batch_sizes_missing": "The report of {model}, order {order:.12}, does not contain the "
        "batch sizes that its TensorRT plan was built for. Run the order again with --force.",
        "folder_of_other_model": "{folder} already serves model {model!r}, so {got!r} cannot be "
        "served from it. Rename one of the two models.",
        "version_of_other_order": "{folder} serves a version {version} of another order than the "
        "registry's version {version} (order {order:.12}); writing would replace files while a "
        "server reads them. Run 'recpress registry restore {model}' and 'recpress triton "
        "export {model}', or remove the folder.",
    }


class PromotionRefused(Refused):
    """A version cannot become champion, or cannot be fetched or served."""

    sentences: ClassVar = {
        "champion_missing": "{model} has no champion in the ledger, so there is no @champion. "
        "Promote a version ('recpress registry promote {model}'), or name one.",
        "champion_to_serve_missing": "{model} has no champion in the ledger. Promote a version: "
        "'recpress registry promote {model}'.",
        "earlier_champion_missing": "{model} has no champion before the current one to go back to; "
        "its ledger has {entries} line(s).",
        "other_champion": "Expected version {expected} to be the champion of {model}, got {got}. "
        "Name the version to roll back from, or leave out --from.",
        "target_unmeasured": "{target} of {model} version {version} is built-unmeasured: it was "
        "built and audited on a machine that could not run it. Measure it on the machine that will "
        "serve it; to use it unmeasured, add --unmeasured.",
        "target_not_accepted": "{target} of {model} version {version} is {outcome}: {reason}. To "
        "use it anyway, add --unaccepted.",
        "not_servable_by_triton": "{model} version {version} has nothing that Triton can serve; it "
        "has {targets}. Triton loads accepted ONNX Runtime graphs and TensorRT plans (built but "
        "unmeasured ones with --unmeasured), and never engines of TensorRT-RTX.",
        "other_release": "Expected {model} version {version} to be order {expected:.12} of "
        "{model}, got a release of {got_model}, order {got:.12}: the version was changed, or not "
        "registered by recpress. Choose another version.",
        "order_not_registered": "Order {order:.12} of {model} is not in the registry {registry}. "
        "Set MLFLOW_TRACKING_URI to the registry it was published in, or register the results of "
        "the store again: 'recpress registry restore {model}'.",
        "champion_not_registered": "The ledger names order {order:.12} as champion of {model} "
        "(version {version} when {by} wrote it). This order is not in the registry {registry}. Set "
        "MLFLOW_TRACKING_URI to the registry it was published in, or register the results of the "
        "store again: 'recpress registry restore {model}'.",
        "champions_unusable": "{problems}",
        "alias_elsewhere": "its champion is version {version}, but the alias @{alias} does not "
        "point to it. Run 'recpress registry promote {model} --version {version}'.",
        "limits_missing": "The report of {model} version {version} has no limits, so its quality "
        "was not judged. Compress the model again with at least one limit.",
        "verdict_contradicts_judgements": "The report of {model} version {version} contradicts "
        "itself: {problem}. It was changed after it was judged. Compress the model again.",
        "outcome_contradicts_verdicts": "The report of {model} version {version} contradicts "
        "itself: it says {stated}, and its targets' verdicts add up to {computed}. It was changed "
        "after it was judged. Compress the model again.",
        "not_accepted": "{model} version {version} is {outcome} ({reasons}). Only an accepted "
        "version can become champion.",
        "nothing_to_roll_back": "No version of {model!r} was champion before the current one, so "
        "there is nothing to roll back to.",
        "rollback_to_other_version": "A rollback of {model!r} goes to version {expected}, not to "
        "{got}. To choose another version, promote it.",
    }
