"""Two towers that are one module: names of arguments, the graph, and towers that stay separate.

``SIGNATURE`` of ``token_draft.py`` has one module, ``encoder``, for both towers. The query tower
reads ``input_ids`` and ``attention_mask``, the item tower ``document_ids`` and ``document_mask``.
The third input is a key, which identifies an item and enters no tower.
"""

import pytest
import torch
from pydantic import ValidationError
from token_draft import (
    CONFIG,
    LONGEST_DOCUMENT,
    LONGEST_QUERY,
    SIGNATURE,
    VOCABULARY,
    tokens,
)

from compressors.contracts import TEXT_RETRIEVER, Signature
from compressors.core.random_inputs import generate_inputs
from compressors.core.scores import network_scores, tower_arguments, tower_vectors
from compressors.core.smoke_test import smoke_test
from compressors.lower.serving_wrapper import served_graphs
from compressors.text_encoder.network import TextRetriever

TEXTS = Signature.model_validate(SIGNATURE)
TABLES = {"encoder.word": VOCABULARY}


def with_inputs(*inputs, **changes):
    """Return the signature with other inputs of query and item, and some fields replaced."""
    key = SIGNATURE["inputs"][2]
    return Signature.model_validate(SIGNATURE | {"inputs": [*inputs, key]} | changes)


def network():
    """Return a small encoder with weights from a seed."""
    torch.manual_seed(0)
    return TextRetriever(**CONFIG).eval()


def test_one_graph_has_the_names_of_the_query_and_the_longest_lists_of_both():
    (graph,) = served_graphs(TEXTS)
    assert (graph.name, graph.module, graph.outputs) == ("encoder", "encoder", ("vector",))
    (item,) = graph.signature.inputs
    assert (item.tensors, item.shape) == (("input_ids", "attention_mask"), (LONGEST_DOCUMENT,))
    # The signature, and with it the data of queries, keeps the length of queries.
    assert TEXTS.of_tower("query").inputs[0].shape == (LONGEST_QUERY,)


def test_item_tower_is_called_with_the_names_of_the_query():
    inputs = generate_inputs(TEXTS, TABLES, 4)
    arguments = tower_arguments(inputs, TEXTS, "item")
    assert arguments.keys() == {"input_ids", "attention_mask"}
    assert arguments["input_ids"] is inputs["document_ids"]
    model = network()
    with torch.no_grad():
        vectors = [tower_vectors(model, inputs, TEXTS, name) for name in ("query", "item")]
        score = network_scores(model, inputs, TEXTS)
    torch.testing.assert_close((vectors[0] * vectors[1]).sum(dim=1), score, rtol=0, atol=1e-6)
    smoke_test(model, TEXTS, TEXT_RETRIEVER)


@pytest.mark.parametrize(
    "changes", [{"padding": "left"}, {"table": "encoder.position"}, {"token_types": "types"}]
)
def test_towers_of_one_module_with_other_inputs_are_two_graphs(changes):
    query, item = SIGNATURE["inputs"][:2]
    signature = with_inputs(query, item | changes)
    assert not signature.shares_tower
    assert [graph.name for graph in served_graphs(signature)] == ["query", "item"]


def test_towers_of_one_module_with_other_tokenizers_are_one_graph():
    query, item = SIGNATURE["inputs"][:2]
    signature = with_inputs(query, item | {"tokenizer": "item.tokenizer.json"})
    assert [graph.name for graph in served_graphs(signature)] == ["encoder"]


def test_towers_with_different_modules_are_two_graphs():
    towers = {**SIGNATURE["towers"], "item": {"module": "other", "inputs": ["document_ids"]}}
    signature = Signature.model_validate(SIGNATURE | {"towers": towers})
    assert [graph.name for graph in served_graphs(signature)] == ["query", "item"]


def test_texts_may_not_declare_the_length_of_another_sequence():
    query = tokens("input_ids", "attention_mask", "query", longest=8)
    item = tokens("document_ids", "document_mask", "text", longest=8)
    item |= {"same_length_as": "input_ids"}
    with pytest.raises(ValidationError) as caught:
        with_inputs(query, item)
    assert caught.value.errors()[0]["type"] == "tokens_share_length"


def test_signature_of_a_tower_needs_towers():
    without = Signature.model_validate(
        {
            "inputs": [SIGNATURE["inputs"][0]],
            "outputs": [SIGNATURE["outputs"][0] | {"kind": "ranking"}],
            "group": "query_id",
        }
    )
    assert not without.shares_tower
    with pytest.raises(ValueError, match="towers"):
        without.of_tower("query")
