"""Convert settings of sentence-transformers' other modules to those of ``TextEncoder``.

The modules after the encoder are one ``Pooling``, any number of ``Dense``, and at most one
``Normalize``.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor

from compressors.errors.text_encoders import TextEncoderRefused
from compressors.text_encoder.network import POOLINGS

POOLING, DENSE, NORMALIZE = "Pooling", "Dense", "Normalize"
SENTENCE = "sentence_embedding"
"""What sentence-transformers calls the vector of a text."""

POOLING_FLAGS = MappingProxyType(
    {
        "pooling_mode_cls_token": "cls",
        "pooling_mode_max_tokens": "max",
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
        "pooling_mode_weightedmean_tokens": "weightedmean",
        "pooling_mode_lasttoken": "lasttoken",
    }
)
"""Poolings by their setting in versions of sentence-transformers before 6."""

ACTIVATION_CLASSES = MappingProxyType({"Identity": "identity", "Tanh": "tanh"})
"""The activation of a projection by its class in ``torch.nn``."""

SIMILARITIES = MappingProxyType({None: "cosine", "cosine": "cosine", "dot": "dot"})
"""How vectors are compared, by the setting ``similarity_fn_name``; cosine is the default."""


def pooling_arguments(
    modules: Sequence[tuple[str, Mapping[str, Any]]], similarity: str | None
) -> dict[str, Any]:
    """Return the arguments of ``TextEncoder`` for pooling, projections and normalization.

    Args:
        modules: class name and settings of each module after the encoder.
        similarity: the setting ``similarity_fn_name`` of the model.

    Raises:
        TextEncoderRefused: a module, its settings, their order, or the similarity is unknown.
    """
    names = [name for name, _ in modules]
    has_normalize = names[-1:] == [NORMALIZE]
    between = names[1 : len(names) - has_normalize]
    if names[:1] != [POOLING] or any(name != DENSE for name in between):
        raise TextEncoderRefused("modules_unknown", got=tuple(names) or "none")
    if similarity not in SIMILARITIES:
        raise TextEncoderRefused(
            "setting_unknown",
            name="similarity_fn_name",
            expected=tuple(name for name in SIMILARITIES if name),
            got=similarity,
        )
    for name, settings in modules:
        for key in ("module_input_name", "module_output_name"):
            if settings.get(key) not in (None, SENTENCE):
                raise TextEncoderRefused(
                    "setting_unknown", name=f"{name}.{key}", expected=SENTENCE, got=settings[key]
                )
    return {
        "pooling": _pooling(modules[0][1]),
        "projections": [_projection(settings) for name, settings in modules if name == DENSE],
        "normalize": has_normalize or SIMILARITIES[similarity] == "cosine",
    }


def projection_weights(number: int, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the float32 weights of a projection by their names in ``TextEncoder``.

    Args:
        number: index of the projection, from 0.
        weights: the tensors of the module ``Dense`` by name.
    """
    return {
        f"projection.{number}.{name.removeprefix('linear.')}": tensor.float()
        for name, tensor in weights.items()
    }


def _pooling(settings: Mapping[str, Any]) -> str:
    """Return the pooling of a module ``Pooling``.

    Raises:
        TextEncoderRefused: it is unknown, or there are several.
    """
    poolings = settings.get("pooling_mode")
    if poolings is None:
        flags = [name for flag, name in POOLING_FLAGS.items() if settings.get(flag)]
        poolings = flags or "mean"
    if not isinstance(poolings, list):
        poolings = [poolings]
    if len(poolings) != 1 or poolings[0] not in POOLINGS:
        raise TextEncoderRefused("pooling_unknown", poolings=POOLINGS, got=tuple(poolings))
    return str(poolings[0])


def _projection(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a module ``Dense``.

    Raises:
        TextEncoderRefused: its activation is unknown, or it has a residual sum.
    """
    if settings.get("use_residual"):
        raise TextEncoderRefused(
            "setting_unknown", name="Dense.use_residual", expected=False, got=True
        )
    activation = str(settings.get("activation_function")).rpartition(".")[2]
    if activation not in ACTIVATION_CLASSES:
        raise TextEncoderRefused(
            "setting_unknown",
            name="Dense.activation_function",
            expected=tuple(ACTIVATION_CLASSES),
            got=activation,
        )
    return {
        "dim": settings.get("out_features"),
        "bias": bool(settings.get("bias", True)),
        "activation": ACTIVATION_CLASSES[activation],
    }
