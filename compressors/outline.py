"""What a step would make of a model, without doing it: every format, shape and byte."""

from compressors.contracts import Bench
from compressors.model import Model
from compressors.plan import plan_of
from compressors.stand_ins import packed_outline
from compressors.step import ModelStep, TableStep, choices_of, output_line
from compressors.units import Unit, folded_norms, stored_bytes


def outline(step: TableStep | ModelStep, source: Model, bench: Bench) -> Model:
    """The outcome of ``compressors.step.run`` over stand-ins, with the plan it would have.

    The plan is exact but for what only the values tell: a training that finds nothing better is
    predicted to have found something, and a layer that a format cannot hold to be taken.

    Args:
        step: the method and its settings.
        source: the model, or an earlier outline; left as it is.
        bench: its schema and the rows of its splits count; none of its files is read.

    Raises:
        NothingToCompress: the step takes no unit of this model.
        CompressionError: the step cannot be carried out on this model.
    """
    model = source.private()
    choices = choices_of(step, model, bench)
    before = Unit.of(source.module)
    if isinstance(step, ModelStep):
        model = step.outline(model, bench)
    else:
        model = packed_outline(model, choices, table=step.storage, settings=step.settings())
    after = Unit.of(model.module)
    sizes = stored_bytes(source.module), stored_bytes(model.module)
    line, folded = output_line(step, source, model), folded_norms(model.module)
    plan = plan_of(step.kind, source, choices, before, after, sizes, line, folded)
    return Model(model.module, source.architecture, model.network, plan)
