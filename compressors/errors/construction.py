"""Errors of building a network from its class.

Code that builds a network catches them and raises ``ModelRefused`` or another error of
``compression.py``. ``sentences`` map a code to its message, in the syntax of ``str.format``.
"""

from typing import ClassVar

from compressors.contracts.coded_error import CodedError


class ConstructionFailed(CodedError):
    """A network cannot be built from its class and configuration.

    ``$class`` in a configuration names the class of an argument. ``$reads`` lists the values that
    the constructor reads from an argument, such as a data set (``docs/bundle.md``).
    """

    sentences: ClassVar = {
        "tensors_too_large": "{problem} Correct 'config' in model.json, or store the weights that "
        "the network was trained with.",
        "arguments_wrong": "{problem}. The 'config' of model.json must be the class's keyword "
        "arguments: {arguments}.",
        "argument_form": "an object in the 'config' of model.json must have the keys \"$class\" "
        'and "$arguments" (a dictionary) and no other key; got {keys}.',
        "reads_form": "an object with \"$reads\" in the 'config' of model.json has the wrong form: "
        "{problem}",
        "argument_class_unknown": "its 'config' names the class {path}, which was not checked when "
        "the bundle was read. Load the bundle again.",
        "constructor_raised": "its constructor raised {error} at {place}: {problem}. Correct "
        "'config' in model.json or the class, and check that {architecture}(**config) works in "
        "Python.",
        "constructor_needs_gpu": "its constructor raised {error} at {place}: {problem}. Build it "
        "without a GPU: move tensors with .to(device) from an argument of {architecture}, which "
        "recpress keeps on the CPU.",
        "attribute_name_unsafe": "expected attribute names without quotes, backslashes and line "
        "ends, because torch writes them into code when it traces a network; got {name!r} in "
        "{module}. Rename it in model.json or in the class.",
    }


class TooLarge(CodedError):
    """A constructor creates more or larger tensors than the stored files explain."""

    sentences: ClassVar = {
        "tensors_many": "its constructor creates far more tensors than the files contain.",
        "tensor_large": (
            "its constructor creates a tensor of {bytes} bytes, but the stored files allow "
            "at most {most_bytes}."
        ),
    }
