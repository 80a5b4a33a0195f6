"""Errors of reading a trained text encoder."""

from typing import ClassVar

from compressors.errors.compression import CompressionError


class TextEncoderRefused(CompressionError):
    """A model of transformers or sentence-transformers cannot become a network of recpress."""

    sentences: ClassVar = {
        "family_unknown": "Expected a model of the families {families}, got the model_type {got} "
        "in config.json. Write the network and its bundle by hand (docs/encoders.md).",
        "setting_unknown": "Expected {expected} as the setting {name}, got {got}. Write the "
        "network and its bundle by hand (docs/encoders.md).",
        "modules_unknown": "Expected the modules Pooling, then any Dense, then perhaps Normalize "
        "after the Transformer in modules.json, got {got}. Write the network and its bundle by "
        "hand (docs/encoders.md).",
        "pooling_unknown": "Expected one pooling of {poolings}, got {got}. Train the model with "
        "one of them, or write the network and its bundle by hand (docs/encoders.md).",
        "weights_missing": "Expected the weights of the encoder in config.json, got none with "
        "{count} of their names: {names}. Save the model again.",
        "weights_unknown": "Expected only weights of the encoder in config.json, got {count} "
        "others: {names}. Save the model again with the config it was trained with.",
    }
