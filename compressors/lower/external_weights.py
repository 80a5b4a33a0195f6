"""Weights of a large graph in files next to it: links to files that the bundle already has."""

import logging
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir
import torch

from compressors.core.state.tensor_files import LARGE_BYTES, TensorFile, file_of

log = logging.getLogger(__name__)


def link_weights(model: ir.Model, path: Path, files: Mapping[str, TensorFile]) -> tuple[Path, ...]:
    """Replace initializers that a bundle's file contains by references to a hard link to it.

    The links are next to the graph, and their names begin with its name. Where links are
    impossible the initializers are unchanged.

    Args:
        model: the graph, before it is saved to ``path``.
        path: the ``.onnx`` file.
        files: files with one tensor, by the tensor's name.

    Returns:
        The links.
    """
    links: dict[Path, None] = {}
    for value in model.graph.initializers.values():
        weights = getattr(value.const_value, "raw", None)  # torch's exporter keeps its tensors
        if not isinstance(weights, torch.Tensor) or weights.nbytes < LARGE_BYTES:
            continue
        file = file_of(weights, files)
        if file is None or value.const_value.nbytes != weights.nbytes:
            continue
        link = path.with_name(f"{path.name}.{file.path.name}")
        try:
            if not link.exists():
                link.hardlink_to(file.path)
        except OSError as fault:
            log.info("%s is written again instead of linked: %s", link.name, fault)
            continue
        value.const_value = ir.ExternalTensor(
            link.name,
            file.start(),
            weights.nbytes,
            value.const_value.dtype,
            shape=value.const_value.shape,
            name=value.name,
            base_dir=path.parent,
        )
        links[link] = None
    return tuple(links)
