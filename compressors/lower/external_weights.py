"""Store large weights of a graph as hard links to the bundle's files instead of copies."""

import logging
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir
import torch

from compressors.core.state.tensor_files import LARGE_BYTES, TensorFile, find_file

log = logging.getLogger(__name__)


def link_weights(model: ir.Model, path: Path, files: Mapping[str, TensorFile]) -> tuple[Path, ...]:
    """Replace large initializers by references to hard links of the bundle's files.

    A link is in the graph's folder and has the name of the graph's file as a prefix. An initializer
    is left unchanged if no file contains it or the file system cannot create the link.

    Args:
        model: the graph, before it is saved to ``path``.
        path: the ``.onnx`` file.
        files: the bundle's files that hold one tensor each, by the tensor's name.

    Returns:
        The paths of the links.
    """
    links: dict[Path, None] = {}
    for value in model.graph.initializers.values():
        weights = getattr(value.const_value, "raw", None)  # torch's exporter keeps its tensors
        if not isinstance(weights, torch.Tensor) or weights.nbytes < LARGE_BYTES:
            continue
        file = find_file(weights, files)
        # Other sizes: a target's conversion changed the tensor, so it is not the one in the file.
        if file is None or value.const_value.nbytes != weights.nbytes:
            continue
        link = path.with_name(f"{path.name}.{file.path.name}")
        try:
            if not link.exists():
                link.hardlink_to(file.path)
        except OSError as fault:
            log.info("%s is copied because it cannot be linked: %s", link.name, fault)
            continue
        value.const_value = ir.ExternalTensor(
            link.name,
            file.start(),  # offset of the tensor's first byte
            weights.nbytes,
            value.const_value.dtype,
            shape=value.const_value.shape,
            name=value.name,
            base_dir=path.parent,
        )
        links[link] = None
    return tuple(links)
