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
└─ PromotionRefused      the verdict does not allow it
"""


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


class PromotionRefused(Refused):
    """The verdict does not allow it."""
