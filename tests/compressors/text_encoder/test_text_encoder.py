"""The encoder of texts: its class, and graphs of its less usual forms.

``CONFIG`` and ``SIGNATURE`` of ``tests/token_draft.py`` describe a small encoder: one network for
queries and documents.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from token_draft import CONFIG, SIGNATURE, VOCABULARY

from compressors.contracts import TEXT_RETRIEVER, Architecture, Bench, Network, Signature
from compressors.contracts.targets import TargetName
from compressors.core.model import Model
from compressors.core.runner import run
from compressors.lower.export import lower
from compressors.lower.serving_wrapper import served_graphs
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8
from compressors.text_encoder.network import TextEncoder, TextRetriever
from infra.onnxruntime.sessions import Session

TEXTS = Signature.model_validate(SIGNATURE)
TANH = {"dim": 6, "bias": True, "activation": "tanh"}
# With ``distance``, attention logits depend on the distance of two tokens, as in MPNet.
FORMS = {
    "distances": {"distance": True, "token_type": False, "pooling": "max", "projections": [TANH]},
    "first token": {"pooling": "cls", "activation": "gelu_tanh", "normalize": False},
}


def test_path_that_bundles_store_names_the_class() -> None:
    assert f"{TextRetriever.__module__}:{TextRetriever.__name__}" == TEXT_RETRIEVER


@pytest.mark.parametrize(
    ("target", "tolerance"),
    [
        ("onnxruntime", 1e-5),  # float32 sums in another order
        # The scales of rows are float16 in this graph, which changes a weight by up to 2^-11.
        pytest.param("tensorrt", 2e-3, marks=pytest.mark.nightly),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_graph_of_a_compressed_encoder_has_the_vectors_of_torch(
    form: str, target: TargetName, tolerance: float, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = CONFIG | FORMS[form]
    network = TextRetriever(**config).eval()
    source = Model(
        network,
        TextRetriever,
        Network(architecture=Architecture(path=TEXT_RETRIEVER, config=config)),
    )
    model = run(RowwiseInt8(), source, Bench(signature=TEXTS), tmp_path / "int8")
    assert ("encoder.distance" in model.network.modules) == (form == "distances")
    (graph,) = served_graphs(TEXTS)
    lower(model.module, graph, target, tmp_path / "encoder.onnx")
    ids = torch.randint(4, VOCABULARY, (5, 12))  # ids 0 to 3 are special tokens
    lengths = torch.tensor([12, 9, 2, 7, 12])
    mask = (torch.arange(12) < lengths[:, None]).long()
    with torch.no_grad():
        expected = model.module.encoder(ids * mask, mask).numpy()
    session = Session(tmp_path / "encoder.onnx", threads=1)
    (vectors,) = session.outputs([(ids * mask).numpy(), mask.numpy()])
    np.testing.assert_allclose(vectors, expected, rtol=0, atol=tolerance)


def test_unknown_pooling_is_refused() -> None:
    with pytest.raises(ValueError, match="lasttoken"):
        TextEncoder(**CONFIG, pooling="lasttoken")
