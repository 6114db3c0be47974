"""PEFT's methods that treat samples apart, mix tokens or route them, around and inside a fused LLaMA: PEFT's own values."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fastpeft as fp

peft = pytest.importorskip("peft")
SHAPE = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
TARGETS = ["q_proj", "v_proj", "down_proj"]


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, initializer_range=0.3))


def scattered(model):
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn_like(p)
    return model.train()


def lora(**more):
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=TARGETS, init_lora_weights=False, **more)
    return peft.get_peft_model(llama(), config)


def adapter_names(model):
    model.add_adapter("other", peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=TARGETS, init_lora_weights=False))
    return model.eval(), {"adapter_names": ["default", "other", "__base__"]}


def xlora(tmp_path):
    for name in ("0", "1"):
        lora().save_pretrained(tmp_path / name)
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=32, xlora_depth=1, adapters={name: str(tmp_path / name) for name in ("0", "1")}
    )
    model = llama()
    model.config.use_cache = False
    return peft.get_peft_model(model, config)


METHODS = {
    "LoRA": lambda path: (lora(), {}),
    "DoRA": lambda path: (lora(use_dora=True), {}),
    "aLoRA": lambda path: (lora(alora_invocation_tokens=[7, 8]), {}),
    "Lily": lambda path: (peft.get_peft_model(llama(), peft.LilyConfig(task_type="CAUSAL_LM", r=4, target_modules=TARGETS)), {}),
    "Poly": lambda path: (
        peft.get_peft_model(llama(), peft.PolyConfig(task_type="CAUSAL_LM", r=4, n_tasks=3, target_modules=TARGETS)),
        {"task_ids": torch.tensor([0, 2, 1])},
    ),
    "CPT": lambda path: (
        peft.get_peft_model(
            llama(), peft.CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[3, 4, 5], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 4])
        ),
        {"input_type_mask": torch.tensor([[1, 1, 2, 2, 3, 3, 4, 4, 4]]).repeat(3, 1)},
    ),
    "prompt tuning": lambda path: (
        peft.get_peft_model(llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
        {},
    ),
    "prefix tuning": lambda path: (
        peft.get_peft_model(llama(), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
        {},
    ),
    "adaption prompt": lambda path: (
        peft.get_peft_model(llama(), peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=2)),
        {},
    ),
    "adapter_names": lambda path: adapter_names(lora()),
    "X-LoRA": lambda path: (xlora(path), {}),
}


def step(model, given):
    model.zero_grad()
    torch.manual_seed(3)  # Poly draws its routes
    loss = model(**given).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("method", "lean"), [(m, lean) for m in METHODS for lean in (False, True) if (m, lean) != ("CPT", True)])
def test_as_peft_alone(method, side, lean, tmp_path):
    """transformers' norms and loss are in float32: against them no more can be asked for. (CPT reads the logits, lean or not.)"""
    model, more = METHODS[method](tmp_path)
    training = model.training
    model = scattered(model).double().train(training)
    torch.manual_seed(2)
    ids = torch.randint(9, 50, (3, 9))
    ids[:, 5:7] = torch.tensor([7, 8])
    mask = torch.ones_like(ids)
    if side == "right":
        mask[1, 7:] = 0
    else:
        mask[1, :3] = mask[2, :1] = 0
    given = {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask.bool() & (torch.arange(9) > 4), ids, -100), **more}
    if method != "prefix tuning":
        given["use_cache"] = False
    theirs = step(model, given)
    fp.optimize(model, lean_logits=lean)
    found = step(model, given)
    assert found.keys() == theirs.keys() and len(theirs) > 1
    for name, want in theirs.items():
        torch.testing.assert_close(found[name], want, rtol=1e-4, atol=2e-5, check_dtype=False, msg=lambda m, name=name: f"{name}: {m}")
