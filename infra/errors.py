"""What can go wrong at the edges, split by whether a second try can help.

InfraError               something outside did not work this time; a retry may help
├─ StoreUnavailable      the object store, or a disk, failed
│  └─ StoreOutage        a store over the network does not answer: orders wait for it
├─ RegistryUnavailable   the model registry failed
│  └─ RegistryOutage     a registry over the network does not answer: orders wait for it
├─ OutOfMemory           there is not enough memory for what was to be done
└─ ChildFailed           a child process was killed or died (its limit is named)
Refused                  what was given cannot be used; retrying will not help
├─ SettingRefused        a setting is missing or unusable
├─ BundleRefused         a bundle is unsafe, incomplete or does not fit together
├─ DataRefused           data failed its checks or does not fit the schema
├─ FileRefused           a file the user named is missing, unreadable or of the wrong kind
├─ RecordRefused         a stored record is damaged, or is not what its place says
├─ ArtifactMissing       no manifest: for us it does not exist
├─ ArtifactDamaged       stored bytes are not the bytes that were written
├─ AlreadyThere          a conditional create lost: the key exists
├─ BuildRefused          an engine could not be built from this graph, or failed its audit
└─ PromotionRefused      a version cannot become champion, or cannot be fetched or served
"""

from typing import ClassVar

from compressors.contracts import CodedError


class InfraError(Exception):
    """Something outside did not work this time; a retry may help."""


class StoreUnavailable(InfraError):
    """The object store, or a disk, failed."""


class StoreOutage(StoreUnavailable):
    """A store over the network did not answer, or answered with its own failure."""


class RegistryUnavailable(InfraError):
    """The model registry failed."""


class RegistryOutage(RegistryUnavailable):
    """A registry over the network did not answer, or answered with its own failure."""


class OutOfMemory(InfraError):
    """There was not enough memory; with more of it, the same work succeeds."""


class ChildFailed(InfraError):
    """A child process was killed or died."""


class Refused(Exception):
    """What was given cannot be used; retrying will not help."""


class SettingRefused(Refused):
    """A setting is missing or unusable."""


class BundleRefused(Refused):
    """A bundle is unsafe, incomplete or does not fit together."""


class DataRefused(Refused):
    """Data failed its checks or does not fit the schema."""


class FileRefused(Refused):
    """A file the user named is missing, unreadable or of the wrong kind."""


class RecordRefused(Refused):
    """A stored record is damaged, or is not what its place says."""


class ArtifactMissing(Refused):
    """There is no manifest, so for us it does not exist."""


class ArtifactDamaged(Refused):
    """Stored bytes are not the bytes that were written."""


class AlreadyThere(Refused):
    """A conditional create lost: the key exists."""


class BuildRefused(Refused):
    """An engine could not be built from this graph, or failed its audit."""


class PromotionRefused(CodedError, Refused):
    """A version cannot become champion, or cannot be fetched or served."""

    sentences: ClassVar = {
        "champion_missing": "{model} has no champion in the ledger. Make one: 'recpress registry "
        "promote {model}', or name a version.",
        "earlier_champion_missing": "{model} has no champion before the current one to go back to; "
        "its ledger has {entries} line(s).",
        "other_champion": "Expected version {expected} to be the champion of {model}, got {got}. "
        "Name the version to roll back from, or leave out --from.",
        "target_unmeasured": "{target} of {model} version {version} is built-unmeasured: it was "
        "built and audited on a machine that could not run it. Measure it where it will serve; to "
        "take it as it is, add --unmeasured.",
        "target_not_accepted": "{target} of {model} version {version} is {outcome}: {reason}. To "
        "take it all the same, add --unaccepted.",
        "not_servable_by_triton": "Triton can serve nothing of {model} version {version}; it has "
        "{targets}. Triton loads accepted ONNX Runtime graphs and TensorRT plans (built but "
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
        "alias_elsewhere": "its champion is version {version}, and the alias @{alias} does not "
        "point to it. Run 'recpress registry promote {model} --version {version}'.",
        "limits_missing": "The report of {model} version {version} has no limits, so nothing was "
        "promised. Compress the model again with at least one limit.",
        "verdict_contradicts_judgements": "The report of {model} version {version} contradicts "
        "itself: {problem}. It was changed after it was judged. Compress the model again.",
        "outcome_contradicts_verdicts": "The report of {model} version {version} contradicts "
        "itself: it says {stated}, and its targets' verdicts add up to {computed}. It was changed "
        "after it was judged. Compress the model again.",
        "not_accepted": "{model} version {version} is {outcome} ({reasons}). Only an accepted "
        "version can become champion.",
    }
