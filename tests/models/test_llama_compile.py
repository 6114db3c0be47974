"""torch.compile of a fused LLaMA in training: one graph, with nothing outside it, for batches of every length."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fastpeft as fp

SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}


@pytest.mark.parametrize("kind", ["lean", "LoRA", "PTv2"])
def test_one_graph_for_every_length(kind):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, initializer_range=0.2)).train()
    fp.optimize(model, lean_logits=kind == "lean")
    if kind in ("LoRA", "PTv2"):
        fp.adapt(model, kind)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=count)
    for length in range(5, 15):
        ids = torch.randint(3, 50, (2, length))
        mask = torch.ones_like(ids)
        mask[1, length - 2 :] = 0
        batch = {"input_ids": ids, "attention_mask": mask, "labels": ids, "use_cache": False}
        out = compiled(**batch)
        assert out.logits.shape == (2, length, 50)
        torch.testing.assert_close(out.loss, model(**batch).loss)
        out.loss.backward()
    assert len(graphs) == 1
