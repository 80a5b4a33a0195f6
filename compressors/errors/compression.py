"""The base class of compression errors, and errors that several packages raise.

CompressionError       the order cannot be carried out as written; a retry would fail again
├─ NothingToCompress   a step, or a name pattern in it, matches no unit of this model
├─ ContractBroken      a step has a bug: it did not do what its plan or layout says
├─ ModelRefused        weights do not fit the architecture, or scores or weights are unusable
├─ NotLowerable        a module cannot be exported for this target
├─ ParityLost          the lowered graph does not compute what the module computes
├─ AuditFailed         the optimized graph does not have the formats of the plan
├─ StepRefused         a step cannot change this network (``steps.py``, which has four more)
├─ MetricRefused       a metric cannot be computed from this data (``metrics.py``)
├─ LimitRefused        limits cannot be judged (``metrics.py``)
├─ InspectionFailed    inputs or outputs of a network cannot be derived (``inspection.py``)
├─ OnnxRefused         an ONNX graph cannot become a network (``onnx_graphs.py``)
├─ TextEncoderRefused  a text encoder cannot become a network (``text_encoders.py``)
└─ OrderRefused        the parts of an order do not fit together (``orders.py``)

``sentences`` of each class map a code to its message, in the syntax of ``str.format``.
``SentenceFormatter`` describes the formats of sequences, such as ``{reasons:; }``.

An order is a request to compress a model: the recipe, the limits and the targets. Lowering writes
the compressed module as a graph for one target, which is a runtime that serves it.

Errors of ``construction.py`` and ``widths.py`` are always caught inside ``compressors``.
"""

from typing import Any, ClassVar, Self, get_args

from compressors.contracts.coded_error import CodedError
from compressors.errors.parity_failure import ParityCode, ParityFailure

_OTHER_IMPORTANCE = "Choose another importance."
_LEAVE_OUT = "Leave this step out."


class CompressionError(CodedError):
    """The base class: the order cannot be carried out as written; a retry would fail again.

    Attributes:
        units: the tables and layers that caused the error, if they are known.
    """

    units: tuple[str, ...] = ()

    def name_cause(self, *units: str) -> Self:
        """Set the units that caused the error, and return the error."""
        self.units = units
        return self


class NothingToCompress(CompressionError):
    """A step, or a name pattern in it, matches no unit of this model.

    Settings in the messages: ``importance`` is the criterion by which parts are selected. ``draws``
    is the number of random fits of a table, of which the best on validation rows is used.
    ``most_loss`` is the largest allowed decrease of the metric.
    """

    sentences: ClassVar = {
        "units_missing": (
            "Expected a table or dense layer that {step!r} can compress, got none: "
            "{reasons:; }. Remove this step, let it select more units, or move it before "
            "the step that changed them."
        ),
        "units_absent": "{step!r} compresses tables or dense layers of a kind that this model does "
        f"not have. {_LEAVE_OUT}",
        "name_unmatched": (
            "Expected a {role} that {pattern!r} of {step!r} matches, got {names}. Correct "
            "the name, or leave it out."
        ),
        "float_table_missing": (
            "{step!r} needs a table, which is a float tensor of two dimensions; these "
            "files have {reasons:; }. Name other tensors, or another file."
        ),
        "input_table_missing": (
            "Expected the table {table!r} that input {input!r} names, got {tables}. "
            "Correct 'table' in model.json."
        ),
        "rows_missing": "{step!r} needs {missing: and } rows; this model has {present}. Add the "
        "data to model.json and pack again, or leave this step out.",
        "loss_missing": "Importance 'gradient' of {step!r} needs a model of task 'ctr' or "
        f"'ranking'; this model has task 'retrieval', whose loss is not supported. "
        f"{_OTHER_IMPORTANCE}",
        "loss_without_probability": "Loss 'calibrated_listwise' of {step!r} needs an output "
        "'logit' or 'probability'; this model has output 'score', which is no probability. Choose "
        "loss 'listwise'.",
        "probability_missing": "{step!r} needs a model of task 'ctr', whose output is a "
        f"probability; this model has task {{task!r}}, whose scores only order rows. {_LEAVE_OUT}",
        "training_unavailable": "Expected a task with a training loss for {step!r}, got "
        f"{{task!r}}. {_LEAVE_OUT}",
        "negatives_without_catalogue": "{step!r} draws {negatives} negatives from the catalogue of "
        "a model of task 'retrieval'; this model has task {task!r}. Set 'negatives' of the "
        "training to 0.",
        "towers_setting": "{step!r} of a model with two towers learns from the vectors of the "
        "original on the training rows; got {setting} {value!r}. Expected {expected}.",
        "row_metric_missing": "{step!r} needs a model of task 'ctr' or 'ranking'; this model has "
        f"task 'retrieval', which is evaluated by full rankings only. {_LEAVE_OUT}",
        "row_metric_for_layers_missing": "{step!r} needs a model of task 'ctr' or 'ranking', or "
        "importance 'random'; this model has task 'retrieval', which is evaluated by full "
        "rankings only. Choose 'random' without most_loss, or leave this step out.",
        "row_metric_for_draws_missing": "{step!r} needs a model of task 'ctr' or 'ranking' for "
        "more than one draw; this model has task 'retrieval', which is evaluated by full rankings "
        "only. Set 'draws' to 1.",
    }


class ContractBroken(CompressionError):
    """A step has a bug: it did not do what its plan or its layout says.

    The layout is the name, shape and dtype of each tensor that the step stores for a unit. An entry
    is a slice of a tensor along its first dimension. Users cannot correct such an error, only
    report it or leave the step out.
    """

    sentences: ClassVar = {
        "source_changed": "{step!r} modified tensors of the model that it received.",
        "scores_not_finite": "After {step!r} the model's scores are not finite numbers.",
        "stored_scores_differ": "After {step!r} the scores of the stored model differ from those "
        "of the one in memory (by up to {gap:g}): some of its state is not stored as tensors.",
        "unit_lost": "After {step!r} the network no longer has {unit!r}.",
        "unit_added": "After {step!r} the network has {unit!r}, which it did not have before.",
        "unit_kept": "{step!r} did not change {unit!r}, which its plan selects.",
        "unit_changed": "{step!r} changed {unit!r}, which its plan skips.",
        "bytes_out_of_bounds": "{step!r} stored {unit!r} in {bytes} bytes; its plan says {least} "
        "to {most}.",
        "format_changed": "{step!r} stores {unit!r} in another format.",
        "fit_incomplete": (
            "The layout of {step!r} has {name!r} as a tensor of the whole table, but its fit "
            "does not return the tensor."
        ),
        "encoded_dtype_differs": "{step!r} encodes {name!r} as {got}, but its layout says "
        "{expected}.",
        "encoded_names_differ": "{step!r} encodes {got}, but its layout has {expected}.",
        "encoded_rows_differ": "Expected {expected} entries of {name!r} from {step!r} for rows "
        "{begin} to {end}, got {got}.",
        "dtype_not_storable": (
            "Expected {name!r} with one of the dtypes {dtypes}, which safetensors can store; the "
            "layout has {dtype}."
        ),
        "tensor_not_storable": (
            "The layout has {name!r} of shape {shape!r}, which safetensors cannot store."
        ),
        "tensor_not_laid_out": "Expected a tensor of the layout, which has {names}; got {name!r}.",
        "entry_outside": "Expected an entry of {name!r} up to {entries}, got {entry}.",
        "dtype_differs": "Expected {name!r} as {expected}, as its layout says, got {got}.",
        "shape_differs": "Expected values that fit into {name!r} of shape {expected!r} from entry "
        "{entry} on, got shape {got!r}.",
        "values_missing": "Expected a tensor with values to write, got one on the meta device.",
    }


class ModelRefused(CompressionError):
    """The stored weights do not fit the architecture, or the network's scores are unusable."""

    sentences: ClassVar = {
        "device_processes_failed": "{problem}",  # message of a process of data-parallel training
        "construction_failed": "{architecture} cannot be built: {problem}",
        "initial_weights_used": (
            "{architecture} computes {names} from its initial weights ({count} tensor(s) "
            "in total). No file stores these values, so they are missing after loading. "
            "Register each as a module, parameter or buffer and save the weights again, or "
            "compute it in forward."
        ),
        "compressed_module_missing": (
            "model.json describes a compressed module {name!r}, but {architecture} has no "
            "module of that name."
        ),
        "format_unknown": (
            "{name!r} is stored as {format!r}, but this version of recpress reads only "
            "{formats}. Upgrade recpress."
        ),
        "record_incomplete": (
            "The record of {name!r} in model.json is incomplete: {problem}. Fetch or pack it again."
        ),
        "tie_not_stored": (
            "{name!r} is tied to {stored!r}, which is in no file. Store it, or correct 'ties' in "
            "model.json."
        ),
        "tie_unknown": "A tie names {name!r} and {stored!r}; both must be weights of "
        "{architecture}. Correct 'ties' in model.json.",
        "values_missing": "After loading, {names} still has no values. Store it with the weights, "
        "or compute it from the configuration in the class's __init__.",
        "tensors_on_accelerator": "Expected every tensor of {architecture} on the CPU, got {names} "
        "on an accelerator. Take the device from an argument of the class and pass 'cpu'.",
        "shared_tensor_differs": (
            "{architecture} uses one tensor as {first!r} and {second!r}, but the files "
            "have different values for the two. Store the one that the network was trained "
            "with, and name the other in 'ties'."
        ),
        "tensors_differ": (
            "The stored tensors do not fit {architecture}: {missing_count} missing "
            "({missing}), {unexpected_count} unexpected ({unexpected}). A tensor that "
            "shares another's memory belongs in 'ties'."
        ),
        "shape_differs": "{name!r} is {stored!r} in the file and {expected!r} in {architecture}. "
        "The widths of every layer must come from 'config'.",
        "dtype_differs": (
            "{name!r} is {stored} in the file and {expected} in the model. Store it as {expected}."
        ),
        "tensor_stored_twice": "{name!r} is in two files of {folder}. Keep one of them.",
        "tensor_name_taken": (
            "{table!r} would be stored as {name!r}, but another tensor has that name. "
            "Rename it, or leave {table!r} out."
        ),
        "file_truncated": "{path} ends within {name!r}, at byte {byte}. Copy or download "
        "the file again.",
        "dtype_unknown": "{name!r} is stored as {dtype}, which recpress does not read. Convert it "
        "to one of {dtypes}.",
        "row_not_finite": "Row {row} of {table!r} has a NaN or infinite weight. Find where "
        "training diverged; such a table cannot be served.",
        "weights_not_float32": (
            "Expected float32 weights in a new bundle, got {dtypes} in {architecture}. "
            "Convert them with model.float() before saving."
        ),
        "network_fails": "{architecture} fails on generated rows that its signature allows (any id "
        "below its table's rows): {problem}. Correct the inputs in model.json, or the network.",
        "single_row_fails": "Expected a score of {architecture} for a request of one row, got "
        "{problem}. A frequent cause is squeeze() without a dimension, which also removes that of "
        "the rows: write squeeze(1). If the code is not yours, set 'repeat_single_row' to true in "
        "the signature.",
        "scores_not_finite": "Expected a finite score of {architecture} for every row that its "
        "signature allows; got NaN or infinity for {count} of {rows} rows before {step!r} was "
        "applied. Check what the network does with an empty list (a mean or a softmax over "
        "nothing) and with the first and last id of a table.",
        "score_shape": "{architecture} must return one finite score per row, (rows,) or (rows, 1); "
        "on {rows} rows it returned {got}.",
        "outputs_shape": "{architecture} must return one score per row for each of its outputs "
        "{outputs}: a tensor (rows, outputs), or a tuple or mapping of tensors (rows,) or "
        "(rows, 1). On {rows} rows it did not: {problem}.",
        "score_not_finite": "{architecture} must return one finite score per row, (rows,) or "
        "(rows, 1); on {rows} rows it returned NaN or infinity.",
        "calls_differ": "Expected {architecture} to give the same rows the same scores, got scores "
        "up to {gap:.3g} apart in two calls. Something random is active in evaluation mode: pass "
        "training=self.training to functional dropout.",
        "loads_differ": "Expected {architecture} to score alike whenever it is loaded, got scores "
        "up to {gap:.3g} apart from two loads: its constructor draws values that no file stores "
        "(differing tensors: {names}). Register them as parameters or buffers and save the weights "
        "again, or compute them from the configuration.",
        "tower_fails": "{architecture}: tower {tower!r} ({module}) fails when it is called with "
        "{inputs}: {problem}. Name the submodule or method that takes exactly the inputs listed "
        "for it in model.json.",
        "tower_vector_shape": "{architecture}: tower {tower!r} ({module}) must return one vector "
        "per row, (rows, dim); on {rows} rows it returned {got}.",
        "tower_lengths_differ": (
            "{architecture}: the query tower's vectors have {query} numbers, the item "
            "tower's {item}. A score is their dot product, so both must have the same "
            "length."
        ),
        "towers_not_the_score": "{architecture}: the dot product of the towers' vectors is up to "
        "{gap:.3g} away from the network's score on generated rows. Only the vectors are served: "
        "put scales, biases and norms into the towers, and let the network return the dot product "
        "or its sigmoid.",
    }


class NotLowerable(CompressionError):
    """A module cannot be exported for this target."""

    sentences: ClassVar = {
        "longest_list_unknown": (
            "A jagged EmbeddingBag needs the length of the longest list that a request may "
            "contain. Declare its input as a jagged_bag with shape [longest]."
        ),
        "export_failed": "The network cannot be exported for {target}: {problem}. Its forward must "
        "be free of Python control flow that depends on tensor values.",
        "size_fixed": "Expected a graph for {target} that accepts any number of rows and ids; its "
        "input {name!r} would have size {size} in dimension {axis}. The network's code converts a "
        "size to a Python number, as len(x) and int(x.shape[0]) do. Write x.shape[0].",
        "tensor_missing": (
            "Expected a tensor {name!r} in the exported graph, got none. Leave its unit out of the"
            " step, or report the network."
        ),
    }


class ParityLost(CompressionError):
    """The lowered graph does not compute what the module computes."""

    sentences: ClassVar = dict.fromkeys(get_args(ParityCode), "{failure}")

    def __init__(self, failure: ParityFailure) -> None:
        """Create an error with the code of a failure, which is its only field."""
        super().__init__(failure.code, failure=failure)
        self.failure = failure

    def __reduce__(self) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        return type(self), (self.failure,), vars(self)


class AuditFailed(CompressionError):
    """The graph, exported or optimized by the runtime, does not have the formats of the plan."""

    sentences: ClassVar = {
        "graph_not_as_ordered": (
            "The graph that ONNX Runtime would serve does not fit the plan: {faults:; }. "
            "Leave the layer or table out of the step, or report the network."
        ),
        "weight_replaced": (
            "The {target} graph does not contain {unit!r} as {expected} bytes of {format}. "
            "Leave the unit out of the step."
        ),
        "weight_expanded": (
            "Expected {expected} bytes of {format} for {unit!r} in the {target} graph, got "
            "{got} bytes. Leave the unit out of the step."
        ),
    }
