"""Small models of transformers with every weight away from its start, one training step of them, and the comparison of two steps."""

from __future__ import annotations

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.3}
# transformers' RMSNorm and its language-model loss are in float32 whatever the model: against them no more can be asked for
SINGLE = {"rtol": 1e-4, "atol": 2e-5}
DOUBLE = {"rtol": 1e-9, "atol": 1e-10}


def llama(**more) -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZE | {"vocab_size": 50, "pad_token_id": 0, "num_key_value_heads": 2} | more))


def bert(**more) -> nn.Module:
    torch.manual_seed(0)
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(**SIZE | off | {"vocab_size": 50, "num_labels": 3} | more))


def vit(**more) -> nn.Module:
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**SIZE | {"image_size": 16, "patch_size": 8, "num_labels": 3} | more))


def text(rows: int = 3, length: int = 9, seed: int = 1) -> dict[str, torch.Tensor]:
    """A padded batch for :func:`llama`, labels at the ends of rows."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 50, (rows, length), generator=generator)
    lengths = torch.randint(length // 2, length + 1, (rows, 1), generator=generator)
    mask = (torch.arange(length) < lengths).long()
    labelled = mask.bool() & (torch.arange(length) >= length // 3)
    return {"input_ids": torch.where(mask.bool(), ids, 0), "attention_mask": mask, "labels": torch.where(labelled, ids, -100)}


def sentences(rows: int = 3, length: int = 9, seed: int = 1) -> dict[str, torch.Tensor]:
    """A padded batch for :func:`bert`."""
    return text(rows, length, seed) | {"labels": torch.arange(rows) % 3}


def scattered(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """In ``dtype``, training, what is trained away from its start, where an adapter changes nothing."""
    model = model.to(dtype)
    generator = torch.Generator().manual_seed(2)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
    return model.train()


def step(model: nn.Module, batch: dict[str, torch.Tensor], **more) -> dict[str, torch.Tensor]:
    """The loss and every gradient of one step."""
    model.zero_grad()
    torch.manual_seed(3)
    loss = model(**batch, **more).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], **close) -> None:
    """Assert that two steps are equal: the same gradients exist, and none of them is nothing but zeros."""
    assert found.keys() == wanted.keys() and len(wanted) > 1, found.keys() ^ wanted.keys()
    for name, want in wanted.items():
        of = f"{name}: "
        torch.testing.assert_close(found[name], want, check_dtype=False, msg=lambda m, of=of: of + m, **close)
    assert any(bool(g.abs().max() > 1e-4) for name, g in wanted.items() if name != "loss")
