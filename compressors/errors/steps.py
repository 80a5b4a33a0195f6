"""Errors of applying a step to a network and its data.

``sentences`` map a code to its message, in the syntax of ``str.format``. ``{{step!r}}`` in an
f-string is the field ``{step!r}`` of the message.
"""

from typing import ClassVar

from compressors.errors.compression import CompressionError

_NO_CALIBRATION = "this bundle has neither calibration nor train data. Add one to model.json"
_ADD_OR_LEAVE_OUT = "Add the data to model.json and pack again, or leave the step out."
_LEAVE_LAYER_OUT = "Leave it out of 'layers'."
_LEAVE_TABLE_OUT = "Leave the table out of the step."


class RowsMissing(CompressionError):
    """A step needs rows or soft labels that the bench does not have."""

    sentences: ClassVar = {
        "calibration_rows_missing": f"{{step!r}} needs calibration rows; {_NO_CALIBRATION} and "
        "pack again, or leave the step out.",
        "input_scales_need_rows": f"Scales of inputs need calibration rows; {_NO_CALIBRATION}, or "
        "use 'float16' for the dense layers.",
        "weighted_needs_rows": "{step!r} needs calibration rows. Add data to model.json and pack "
        "again, or set 'weighted' to false.",
        "gptq_needs_rows": f"{{step!r}} with rounding 'gptq' needs calibration rows; "
        f"{_NO_CALIBRATION}, or round to nearest.",
        "activations_need_rows": f"{{step!r}} needs calibration rows; {_NO_CALIBRATION}, or set "
        "importance to 'magnitude' and reconstruct to false.",
        "validation_rows_missing": f"{{step!r}} needs validation rows. {_ADD_OR_LEAVE_OUT}",
        "train_rows_missing": f"{{step!r}} needs train rows. {_ADD_OR_LEAVE_OUT}",
        "traffic_rows_missing": "{step!r} needs rows of traffic (requests without labels). "
        f"{_ADD_OR_LEAVE_OUT}",
        "training_needs_rows": f"Training needs train and validation rows. {_ADD_OR_LEAVE_OUT}",
        "catalogue_missing": "{negatives} negatives of each batch are drawn from the catalogue, "
        "the split 'items'. Add it to the bench, or set 'negatives' of the training to 0.",
        "gradients_need_rows": f"Gradients need train rows. {_ADD_OR_LEAVE_OUT}",
        "lookup_counts_need_rows": f"Counting lookups needs train rows. {_ADD_OR_LEAVE_OUT}",
        "soft_labels_missing": "{step!r} needs train rows and soft labels, which are a teacher's "
        "predictions for them. Add train data to model.json and pack again, or leave the step out.",
        "soft_labels_differ": "{step!r} needs one soft label per training row; got {got} for "
        "{expected} rows.",
    }


class StepRefused(CompressionError):
    """A step cannot change this network in the way that its settings require.

    ``units`` of ``share_unreachable`` is what a share counts, such as channels or multiply-adds.
    The settings ``multiple`` and ``least`` of ``channels`` restrict how few channels a layer keeps.
    """

    sentences: ClassVar = {
        "network_not_changeable": "Expected a network that {step!r} can change, got {problem} "
        "while it was applied. Leave the layer or table out of the step, or the step out of the "
        "recipe.",
        "network_fails": (
            "After {step!r} the network no longer runs: {problem}. Some of its code reads "
            "the weights of a layer without calling the layer; leave that layer out of the "
            "step."
        ),
        "unit_not_changeable": "Expected a unit that {step!r} can change, got {unit!r}, which the "
        "recipe names: {reason}. Remove the name, or use a pattern with '*', which skips such "
        "units.",
        "already_compressed": (
            "{unit!r} is already stored as {format}. Leave it out of this step, or move this step "
            "before the one that compressed it."
        ),
        "table_renormalizes": (
            "Table {table!r} renormalizes its rows during lookups (max_norm). Renormalize "
            "its weights once, and build the table without max_norm."
        ),
        "layer_not_linear": "Expected an nn.Linear, got {got}.",
        "format_missing": "Expected a format for {role} {unit!r}, got none.",
        "device_missing": "Device {device!r} does not exist: torch {torch} finds no CUDA GPU. Use "
        "device 'cpu'.",
        "device_processes_failed": "{problem}",  # message of a process of data-parallel training
        "result_missing": "A step ended without a result.",
        "network_not_traceable": "The consumers of each layer could not be determined from the "
        "network: {problem}. Its forward must be free of Python control flow that depends on "
        "tensor values; leave this step out for a network that cannot be exported.",
        "layer_inputs_zero": "Dense layer {layer!r} receives only zeros on the calibration rows, "
        f"so the range of its inputs is unknown. {_LEAVE_LAYER_OUT}",
        "layer_inputs_not_finite": "Dense layer {layer!r} receives an input of {value} on the "
        "calibration rows, so its scale is unknown. Leave it out of 'layers', or correct the rows.",
        "layer_not_called": "Dense layer {layer!r} never ran on the calibration rows. "
        f"{_LEAVE_LAYER_OUT}",
        "widths_fail": (
            "The network fails with {widths}: {problem}. Leave one of {layers} out of 'layers'."
        ),
        "channels_read_elsewhere": (
            "Without the removed channels, the network's scores differ from those with the "
            "channels set to zero (by up to {gap}): some code reads the channels of "
            "{layers} without calling the layers. Leave them out of 'layers'."
        ),
        "folded_scores_differ": (
            "After 'fold' the network's scores differ from those before (by up to {gap}): "
            "some code reads its layers without calling them. Leave them out of 'layers'."
        ),
        "norm_without_statistics": (
            "Expected a batch norm with running statistics, got one without; it cannot be folded. "
            "Leave its layer out of 'layers'."
        ),
        "norm_not_foldable": "Expected a norm that can be folded into a dense layer, got a {kind}.",
        "channel_gradients_zero": "Importance 'gradient' of 'channels' is zero for every weight: "
        "the loss has no gradient on the training rows. Choose another importance.",
        "channel_inputs_zero": "Importance {importance!r} of 'channels' is zero for every weight: "
        "the consuming layers receive only zeros. Choose another importance.",
        "dimension_gradients_zero": "Importance 'gradient' of 'dimensions' is zero for every "
        "dimension: the loss has no gradient on the training rows. Choose another importance.",
        "gradients_need_loss": "Gradients need a loss of rows or lists, which task 'retrieval' "
        "does not have. Choose another importance.",
        "share_unreachable": (
            "'channels' cannot leave only {limit:,.0f} {units}: with every width at its "
            "minimum there are {least:,.0f}. Set a larger share, name more layers, or "
            "lower 'multiple' or 'least'."
        ),
        "recalibrated_already": "{step!r} was already applied ({method}). Keep only the last "
        "of the two steps.",
        "slope_not_positive": (
            "'recalibrate' finds no increasing calibration map: the best slope of the logit on the "
            "validation rows is {slope:.3g}. The model orders these rows no better than "
            "chance; check their labels."
        ),
        "slope_not_positive_without_offset": (
            "'recalibrate' finds no increasing calibration map without an offset: the best slope "
            "of the logit on the validation rows is {slope:.3g}. Try 'platt' or 'best'."
        ),
        "scores_equal": (
            "'recalibrate' by isotonic regression needs rows with different scores; all "
            "validation rows have the same score. Choose 'platt'."
        ),
        "attribute_taken": (
            "{architecture} has an attribute {name!r}, the name that recpress gives to the "
            "calibration map. Rename the attribute in the class."
        ),
    }


class ValueNotStorable(CompressionError):
    """A weight, scale or offset is outside the range of the type in which a table is stored.

    ``quantity`` is ``scale``, ``offset`` or ``scale or offset``.
    """

    sentences: ClassVar = {
        "weight_beyond_bfloat16": "A weight of {weight:g} is beyond bfloat16's 3.39e38. "
        f"{_LEAVE_TABLE_OUT}",
        "weight_beyond_float16": "A weight of {weight:g} is beyond float16's 65504. Set the step's "
        "scale to 'float32'.",
        "codebook_beyond_float16": "A codebook has {value:g}, beyond float16's 65504. Set the "
        "step's codebook_type to 'float32'.",
        "scale_beyond_float16": "The {quantity} for a weight of {weight:g} is above float16's "
        "largest number. Set the step's scale to 'float32'.",
        "scale_beyond_float32": "The {quantity} for a weight of {weight:g} is above float32's "
        f"largest number. {_LEAVE_TABLE_OUT}",
        "row_not_finite": "Row {row} has a NaN or infinite weight; it cannot be stored.",
    }


class TrainingFailed(CompressionError):
    """A network cannot be trained with these settings, or training diverged."""

    sentences: ClassVar = {
        "nothing_trainable": "Expected a network with float32 weights to train, got one whose "
        "weights are all compressed. Move the training before the compression.",
        "diverged": "Training diverged: the loss is {loss} in epoch {epoch}. Lower learning_rate, "
        "or raise warmup.",
        "float_layers_needed": "Training in {precision} needs dense layers in float32; {layer!r} "
        "is already {format}. Set 'precision' of its training to float32.",
    }


class DistillationRefused(CompressionError):
    """A student, or its hints or auxiliary head, does not fit the original network."""

    # A hint is the output of a layer of the original, which the student's layer of the same name
    # learns to predict. An auxiliary head is another output of the student, only for training.

    sentences: ClassVar = {
        "hints_need_original": (
            "Hints of {step!r} come from layers of the network at the start of the recipe, "
            "which is not available. Set 'original' of the model, or leave out 'hints'."
        ),
        "auxiliary_head_missing": "Expected an auxiliary head to evaluate, got none.",
        "layer_missing": "The {network} has no layer {layer!r} for a hint or a head; it "
        "has {layers}.",
        "layer_output_unusable": "Layer {layer!r} outputs {got}; hints and heads need floats "
        "(rows, width). Name another layer.",
        "hint_shapes_differ": "Hint {layer!r} has shape {student!r} in the student and "
        "{original!r} in the original; only the last dimension may differ. Name another layer.",
        "argument_unknown": (
            "'distill' cannot build its student: {architecture} has no argument "
            "{argument!r}; it has {arguments}."
        ),
        "construction_failed": "'distill' cannot build its student: {architecture} with {config}: "
        "{problem}",
        "layer_added": "The student of 'distill' has {unit!r}, which the original does not have: a "
        "student has the original's layers or fewer. Name another configuration.",
        "table_shortened": (
            "The student of 'distill' has fewer rows in table {table!r} ({got}) than the "
            "original ({expected}), so some ids would be out of range. Do not change the "
            "number of rows of tables."
        ),
        "table_untrained": (
            "The student of 'distill' has a table {table!r} of another shape, which would "
            "keep its initial values, because tables are not trained. Set 'tables' of its "
            "training, or do not change the shapes of tables."
        ),
        "table_packed": (
            "The student of 'distill' has table {table!r} in another shape, but the table "
            "is already stored as {format}. Move 'distill' before the step that compresses "
            "the table, or do not change its shape."
        ),
        "layer_packed": (
            "'distill' into a smaller student must come before quantization of dense "
            "layers; {layer!r} is already stored in fewer bits. Move 'distill' to the "
            "front of the recipe."
        ),
        "already_recalibrated": (
            "'distill' into a smaller student must come before 'recalibrate', whose calibration "
            "map fits only the network on which it was fitted. Move 'recalibrate' to the end of "
            "the recipe."
        ),
    }
