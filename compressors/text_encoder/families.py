"""Convert settings and weights of Hugging Face's models to those of ``TextEncoder``.

``TextEncoder`` is in ``network.py``, and ``Layer``, its transformer layer, in ``layers.py``.

A family is a ``model_type`` of the library transformers. Families differ in the names of their
settings and weights, in which row of the table of positions the first token has, and in whether
attention depends on the distance of tokens. The package transformers is not needed: settings are
JSON, and weights are named tensors.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from compressors.errors.text_encoders import TextEncoderRefused

WORDS = "embeddings.word_embeddings.weight"
POSITIONS = "embeddings.position_embeddings.weight"
TYPES = "embeddings.token_type_embeddings.weight"
DISTANCE_BUCKETS = "encoder.relative_attention_bias.weight"

ACTIVATION_NAMES = MappingProxyType(
    {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
)
"""The activation of ``TextEncoder`` by its name in transformers."""

FARTHEST = 128
"""MPNet has one attention bias for all distances of at least this many tokens, per direction."""


@dataclass(frozen=True)
class Family:
    """How the models of a family differ from ``TextEncoder``.

    Attributes:
        settings: name of each setting in ``config.json``, by the argument of ``TextEncoder``.
        layer: prefix of the names of a layer's weights; ``{}`` stands for the layer's number.
        parts: names in a layer, by the name in ``Layer``.
        first_position: row of the first token in the table of positions; None for the row after
            that of the padding token.
        token_type: whether there is a table of token types.
        distance: whether attention depends on the distance of tokens.
        epsilon: constant of the norms, where it is no setting.
    """

    settings: Mapping[str, str]
    layer: str
    parts: Mapping[str, str]
    first_position: int | None
    token_type: bool = False
    distance: bool = False
    epsilon: float | None = None


BERT_SETTINGS = {
    "dim": "hidden_size",
    "heads": "num_attention_heads",
    "hidden": "intermediate_size",
    "layers": "num_hidden_layers",
    "activation": "hidden_act",
    "epsilon": "layer_norm_eps",
}
BERT_PARTS = {
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
    "output_norm": "output.LayerNorm",
}
BERT = Family(BERT_SETTINGS, "encoder.layer.{}", BERT_PARTS, first_position=0, token_type=True)
ROBERTA = Family(
    BERT_SETTINGS, "encoder.layer.{}", BERT_PARTS, first_position=None, token_type=True
)
MPNET = Family(
    BERT_SETTINGS,
    "encoder.layer.{}",
    {
        **BERT_PARTS,
        "attention.query": "attention.attn.q",
        "attention.key": "attention.attn.k",
        "attention.value": "attention.attn.v",
        "attention.output": "attention.attn.o",
        "attention_norm": "attention.LayerNorm",
    },
    first_position=2,  # its class does not read the setting of the padding token
    distance=True,
)
DISTILBERT = Family(
    {
        "dim": "dim",
        "heads": "n_heads",
        "hidden": "hidden_dim",
        "layers": "n_layers",
        "activation": "activation",
    },
    "transformer.layer.{}",
    {
        "attention.query": "attention.q_lin",
        "attention.key": "attention.k_lin",
        "attention.value": "attention.v_lin",
        "attention.output": "attention.out_lin",
        "attention_norm": "sa_layer_norm",
        "intermediate": "ffn.lin1",
        "output": "ffn.lin2",
        "output_norm": "output_layer_norm",
    },
    first_position=0,
    epsilon=1e-12,
)
FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "bert": BERT,
        "roberta": ROBERTA,
        "xlm-roberta": ROBERTA,
        "distilbert": DISTILBERT,
        "mpnet": MPNET,
    }
)
"""The families by ``model_type``."""

FIXED_SETTINGS = MappingProxyType(
    {
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "add_cross_attention": False,
    }
)
"""Settings for which ``TextEncoder`` supports only this value; they may be missing or null."""


def encoder_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``TextEncoder`` for a model, without those of pooling.

    Args:
        config: the settings in ``config.json``.

    Raises:
        TextEncoderRefused: the family is unknown, or a setting is missing or has another value than
            ``TextEncoder`` computes.
    """
    family = family_of(config)
    for name, expected in FIXED_SETTINGS.items():
        if config.get(name) not in (None, expected):
            raise TextEncoderRefused(
                "setting_unknown", name=name, expected=expected, got=config[name]
            )
    activation = str(config.get(family.settings["activation"]))
    if activation not in ACTIVATION_NAMES:
        raise TextEncoderRefused(
            "setting_unknown",
            name=family.settings["activation"],
            expected=tuple(ACTIVATION_NAMES),
            got=activation,
        )
    epsilon = family.epsilon
    if epsilon is None:
        epsilon = _number(config, family.settings["epsilon"], float)
    positions = _number(config, "max_position_embeddings", int)
    sizes = {
        name: _number(config, family.settings[name], int)
        for name in ("dim", "heads", "hidden", "layers")
    }
    if sizes["dim"] % sizes["heads"]:
        raise TextEncoderRefused(
            "setting_unknown",
            name=family.settings["heads"],
            expected=f"a divisor of {sizes['dim']}",
            got=sizes["heads"],
        )
    return {
        "vocabulary": _number(config, "vocab_size", int),
        "longest": positions - _first_position(family, config),
        **sizes,
        "activation": ACTIVATION_NAMES[activation],
        "epsilon": epsilon,
        "token_type": family.token_type,
        "distance": family.distance,
    }


def encoder_weights(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the float32 weights of ``TextEncoder``, without projections (layers after pooling).

    Args:
        config: the settings in ``config.json``, which ``encoder_arguments`` accepts.
        weights: the tensors of the model by name; those of a pooling layer or of output layers that
            only pretraining needs are not used.

    Raises:
        TextEncoderRefused: a tensor is missing, or the encoder has one that ``TextEncoder`` lacks.
    """
    family, layers = family_of(config), encoder_arguments(config)["layers"]
    float_weights = {name: tensor for name, tensor in weights.items() if tensor.is_floating_point()}
    prefix = next((name.removesuffix(WORDS) for name in float_weights if name.endswith(WORDS)), "")
    # The settings may claim a huge number of layers. Every layer has weights, so there are fewer
    # layers than tensors; names of one more layer suffice to report missing ones.
    names = _names(family, min(layers, len(float_weights) + 1))
    if missing := [prefix + name for name in names.values() if prefix + name not in float_weights]:
        raise TextEncoderRefused("weights_missing", names=tuple(missing[:5]), count=len(missing))
    encoder_prefixes = (f"{prefix}embeddings.", prefix + family.layer.partition("layer")[0])
    read = {prefix + name for name in names.values()}
    encoder_weight_names = [name for name in float_weights if name.startswith(encoder_prefixes)]
    if unread := [name for name in encoder_weight_names if name not in read]:
        raise TextEncoderRefused("weights_unknown", names=tuple(unread[:5]), count=len(unread))
    result = {ours: weights[prefix + theirs].float() for ours, theirs in names.items()}
    result["position.weight"] = result["position.weight"][_first_position(family, config) :].clone()
    if family.token_type:
        # A text has one sentence, so all its tokens have type 0.
        result["token_type"] = result["token_type"][0].clone()
    if family.distance:
        result["distance.weight"] = _by_distance(
            result["distance.weight"], len(result["position.weight"])
        )
    return result


def family_of(config: Mapping[str, Any]) -> Family:
    """Return the family of a model.

    Raises:
        TextEncoderRefused: it is unknown.
    """
    name = str(config.get("model_type"))
    if name not in FAMILIES:
        raise TextEncoderRefused("family_unknown", got=name, families=tuple(FAMILIES))
    return FAMILIES[name]


def _number(config: Mapping[str, Any], name: str, kind: type[int | float]) -> Any:
    """Return a setting that is a positive number.

    Raises:
        TextEncoderRefused: it is missing or another value.
    """
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int | kind) or not value > 0:
        expected = "a positive integer" if kind is int else "a positive number"
        raise TextEncoderRefused("setting_unknown", name=name, expected=expected, got=value)
    return value


def _first_position(family: Family, config: Mapping[str, Any]) -> int:
    """Return the row of the first token in the model's table of positions."""
    if family.first_position is not None:
        return family.first_position
    padding = config.get("pad_token_id")
    if isinstance(padding, bool) or not isinstance(padding, int) or padding < 0:
        raise TextEncoderRefused(
            "setting_unknown", name="pad_token_id", expected="an id", got=padding
        )
    return padding + 1


def _names(family: Family, layers: int) -> dict[str, str]:
    """Return the names of the model's tensors by those of ``TextEncoder``."""
    names = {"word.weight": WORDS, "position.weight": POSITIONS}
    if family.token_type:
        names["token_type"] = TYPES
    if family.distance:
        names["distance.weight"] = DISTANCE_BUCKETS
    return names | dict(_module_names(family, layers))


def _module_names(family: Family, layers: int) -> Iterator[tuple[str, str]]:
    """Yield the names of weights and biases in ``TextEncoder`` and in the model."""
    modules = {"norm": "embeddings.LayerNorm"}
    for number in range(layers):
        for ours, theirs in family.parts.items():
            modules[f"layer.{number}.{ours}"] = f"{family.layer.format(number)}.{theirs}"
    for ours, theirs in modules.items():
        for kind in ("weight", "bias"):
            yield f"{ours}.{kind}", f"{theirs}.{kind}"


def _by_distance(buckets: Tensor, longest: int) -> Tensor:
    """Return the attention bias of each distance of two tokens, for each head.

    MPNet learns a bias for each of the small distances, and one for each range of larger ones. Half
    of the buckets are for the token itself and tokens before it, the others for tokens after it. In
    either half, half of the buckets are for single distances.

    Args:
        buckets: float ``(buckets, heads)``.
        longest: the largest number of tokens of a text.

    Returns:
        Float ``(2 * longest - 1, heads)``; row ``longest - 1 + k - q`` is that of a token ``q``
        that attends to a token ``k``.
    """
    distance = torch.arange(1 - longest, longest)
    half = len(buckets) // 2
    single = half // 2
    far = distance.abs()
    ranges = torch.log(far.clamp(min=1).float() / single) / math.log(FARTHEST / single)
    bucket = (single + (ranges * (half - single)).long()).clamp(max=half - 1)
    bucket = torch.where(far < single, far, bucket) + half * (distance > 0)
    return buckets[bucket]
