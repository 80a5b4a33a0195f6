"""Data types that all packages of the project use: no math, no I/O, no torch.

``infra`` may import this package but nothing else of ``compressors``. Reading an order therefore
loads no tensor library.

coded_error.py        errors that carry a code and fields
value_errors/         errors about values in documents and settings, as code and fields
reasons/              reasons of decisions and verdicts, as code and fields
reasoned.py           base class of decisions that have reasons
artifact.py           a stored object, named by its content hash
memory_errors.py      recognize errors caused by too little memory
frozen.py             base class of immutable values; values that were renamed
inputs/               the kinds of inputs of a model
named_object.py       import an object that a text ``module:name`` names
task_kind.py          properties of each task kind, and the registry of task kinds
metrics/              properties of each metric, and the registry of metrics
limits.py             the limits of an order
signature.py          inputs and outputs of a model
output_metrics.py     names of metrics and limits of a model with several outputs
network.py            the description that, with the tensors, defines a module
plan.py               the decisions of a recipe for each table and layer
bench.py              the data, teachers and settings that a step may use, without test data
targets/              properties of each serving target, and the registry of targets
verdicts.py           estimates, judged limits and the verdict of a target
"""

from compressors.contracts.artifact import Artifact as Artifact
from compressors.contracts.artifact import Sha256 as Sha256
from compressors.contracts.artifact import artifact_name as artifact_name
from compressors.contracts.artifact import digest as digest
from compressors.contracts.bench import SOFT_LABELS as SOFT_LABELS
from compressors.contracts.bench import Bench as Bench
from compressors.contracts.bench import Part as Part
from compressors.contracts.bench import Split as Split
from compressors.contracts.bench import required_parts as required_parts
from compressors.contracts.coded_error import CodedError as CodedError
from compressors.contracts.frozen import Frozen as Frozen
from compressors.contracts.frozen import read_renamed as read_renamed
from compressors.contracts.inputs import RAGGED as RAGGED
from compressors.contracts.inputs import AnyInput as AnyInput
from compressors.contracts.inputs import BoundedInput as BoundedInput
from compressors.contracts.inputs import DataInput as DataInput
from compressors.contracts.inputs import DenseInput as DenseInput
from compressors.contracts.inputs import IdField as IdField
from compressors.contracts.inputs import IdInput as IdInput
from compressors.contracts.inputs import IntegerInput as IntegerInput
from compressors.contracts.inputs import JaggedBag as JaggedBag
from compressors.contracts.inputs import KeyInput as KeyInput
from compressors.contracts.inputs import ListInput as ListInput
from compressors.contracts.inputs import MatrixInput as MatrixInput
from compressors.contracts.inputs import PaddedBag as PaddedBag
from compressors.contracts.inputs import SequenceInput as SequenceInput
from compressors.contracts.inputs import TokensInput as TokensInput
from compressors.contracts.inputs import ValueRange as ValueRange
from compressors.contracts.inputs import all_tables as all_tables
from compressors.contracts.inputs import tensor_names as tensor_names
from compressors.contracts.inputs import value_ranges as value_ranges
from compressors.contracts.limits import Limit as Limit
from compressors.contracts.limits import limit_problems as limit_problems
from compressors.contracts.limits import limit_warnings as limit_warnings
from compressors.contracts.memory_errors import is_out_of_memory as is_out_of_memory
from compressors.contracts.metrics import Metric as Metric
from compressors.contracts.metrics import MetricName as MetricName
from compressors.contracts.metrics import measured_metrics as measured_metrics
from compressors.contracts.metrics import metric as metric
from compressors.contracts.metrics import metric_problem as metric_problem
from compressors.contracts.metrics import quality_metrics as quality_metrics
from compressors.contracts.network import ARGUMENTS as ARGUMENTS
from compressors.contracts.network import CLASS as CLASS
from compressors.contracts.network import ONNX_NETWORK as ONNX_NETWORK
from compressors.contracts.network import OWN_NETWORKS as OWN_NETWORKS
from compressors.contracts.network import READS as READS
from compressors.contracts.network import TEXT_RETRIEVER as TEXT_RETRIEVER
from compressors.contracts.network import Architecture as Architecture
from compressors.contracts.network import ModuleRecord as ModuleRecord
from compressors.contracts.network import Network as Network
from compressors.contracts.network import Reads as Reads
from compressors.contracts.network import RecordedCall as RecordedCall
from compressors.contracts.network import is_class_description as is_class_description
from compressors.contracts.output_metrics import limits_of_outputs as limits_of_outputs
from compressors.contracts.plan import DROPPED as DROPPED
from compressors.contracts.plan import Plan as Plan
from compressors.contracts.plan import PlanLine as PlanLine
from compressors.contracts.reasoned import Reasoned as Reasoned
from compressors.contracts.reasons import Reason as Reason
from compressors.contracts.reasons import join_reasons as join_reasons
from compressors.contracts.signature import FORWARD as FORWARD
from compressors.contracts.signature import ITEMS as ITEMS
from compressors.contracts.signature import TRAFFIC as TRAFFIC
from compressors.contracts.signature import Attributes as Attributes
from compressors.contracts.signature import Output as Output
from compressors.contracts.signature import Signature as Signature
from compressors.contracts.signature import Tower as Tower
from compressors.contracts.signature import Towers as Towers
from compressors.contracts.targets import TARGETS as TARGETS
from compressors.contracts.targets import Target as Target
from compressors.contracts.targets import TargetName as TargetName
from compressors.contracts.targets import default_target as default_target
from compressors.contracts.targets import target as target
from compressors.contracts.task_kind import ScoreUnit as ScoreUnit
from compressors.contracts.task_kind import TaskKind as TaskKind
from compressors.contracts.task_kind import task_kind as task_kind
from compressors.contracts.verdicts import Estimate as Estimate
from compressors.contracts.verdicts import Judgement as Judgement
from compressors.contracts.verdicts import Outcome as Outcome
from compressors.contracts.verdicts import Verdict as Verdict
from compressors.contracts.verdicts import overall as overall
