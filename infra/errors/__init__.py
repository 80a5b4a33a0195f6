"""The error classes of ``infra``, by whether a retry may help.

InfraError               something outside this process failed; a retry may help
├─ StoreUnavailable      the object store, or a disk, failed
│  └─ StoreOutage        a remote store does not respond: orders wait until it does
├─ RegistryUnavailable   the model registry failed
│  └─ RegistryOutage     a remote registry does not respond: orders wait until it does
├─ ConcurrentChange      another process changed data while it was read or written
├─ OutOfMemory           there was not enough memory
├─ ChildFailed           a child process failed, was killed or reached its time limit
├─ ServiceFailed         a service ended, is not ready, or reported a failure
├─ NoAnswer              a service did not respond within the time limit
└─ ScoringFailed         a runtime failed on inputs
Refused                  the input cannot be used; a retry will not help
├─ CommandRefused        options of a command, or an order, cannot be used
├─ SettingRefused        a setting is missing or unusable
├─ BundleRefused         a bundle is unsafe, incomplete or inconsistent
├─ DraftRefused          a draft cannot be written from a network and data
├─ DataRefused           data failed its checks or does not fit the signature
├─ FileRefused           a file the user named is missing, unreadable or of the wrong kind
├─ StoreRefused          a key, URI, record or folder does not have the form the store needs
├─ RecordRefused         a stored record is damaged, or does not belong to its key
├─ ArtifactMissing       something expected in the store or the registry does not exist
├─ ArtifactDamaged       stored bytes differ from the bytes that were written
├─ AlreadyThere          a key that may only be created, and never replaced, exists already
├─ BuildRefused          an engine could not be built from a graph, or failed its audit
├─ RegistryRefused       the registry has no such entry, or cannot store an entry
├─ PromotionRefused      a version cannot become champion, or cannot be fetched or served
└─ TritonRefused         a Triton folder belongs to another program, or a graph cannot be served

Import the classes from here. Each file contains the classes of one subject. An error is raised with
a code and fields, and its sentence is formatted from them: ``sentences`` of the class maps each
code to a template with the fields in braces (``compressors/contracts/coded_error.py``). The format
specifications ``list`` and ``lines`` put each item of a sequence on a separate line.
``docs/errors.md`` is generated from these templates.

base.py       the two base classes
settings.py   settings
commands.py   options and orders
bundles.py    bundles, data and files
drafts.py     drafts (bundles before they are packed) that are written from a network
store.py      the object store and its records
registry.py   the registry, promotions and Triton repositories
runtimes.py   engines and scoring
processes.py  memory, child processes and services
"""

from infra.errors.base import InfraError as InfraError
from infra.errors.base import Refused as Refused
from infra.errors.bundles import BundleRefused as BundleRefused
from infra.errors.bundles import DataRefused as DataRefused
from infra.errors.bundles import FileRefused as FileRefused
from infra.errors.commands import CommandRefused as CommandRefused
from infra.errors.drafts import DraftRefused as DraftRefused
from infra.errors.processes import ChildFailed as ChildFailed
from infra.errors.processes import NoAnswer as NoAnswer
from infra.errors.processes import OutOfMemory as OutOfMemory
from infra.errors.processes import ServiceFailed as ServiceFailed
from infra.errors.registry import PromotionRefused as PromotionRefused
from infra.errors.registry import RegistryOutage as RegistryOutage
from infra.errors.registry import RegistryRefused as RegistryRefused
from infra.errors.registry import RegistryUnavailable as RegistryUnavailable
from infra.errors.registry import TritonRefused as TritonRefused
from infra.errors.runtimes import BuildRefused as BuildRefused
from infra.errors.runtimes import ScoringFailed as ScoringFailed
from infra.errors.settings import SettingRefused as SettingRefused
from infra.errors.store import AlreadyThere as AlreadyThere
from infra.errors.store import ArtifactDamaged as ArtifactDamaged
from infra.errors.store import ArtifactMissing as ArtifactMissing
from infra.errors.store import ConcurrentChange as ConcurrentChange
from infra.errors.store import RecordRefused as RecordRefused
from infra.errors.store import StoreOutage as StoreOutage
from infra.errors.store import StoreRefused as StoreRefused
from infra.errors.store import StoreUnavailable as StoreUnavailable
