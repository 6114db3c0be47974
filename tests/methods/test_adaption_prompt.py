"""LLaMA-Adapter against PEFT's own layer in float64: values and gradients, files, generation; and under fastpeft.optimize."""

import types

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

import fastpeft as fp
from fastpeft.cost.profile import measure
from fastpeft.fused.attention import llama as attention_llama
from fastpeft.fused.head.models import FusedLlamaForCausalLM
from fastpeft.models.llama import PARTS

SHAPE = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 50}
METHOD = fp.AdaptionPrompt(adapter_len=5, adapter_layers=3)


def base(kv_heads=2, dtype=torch.float64, **more):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE | more, num_key_value_heads=kv_heads, initializer_range=0.2)).to(dtype)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.data += torch.randn_like(p)
    return model


def scattered(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "adaption" in name:
                p += 0.5 * torch.randn_like(p)
    return model


def theirs(model, **options):
    peft = pytest.importorskip("peft")
    options = {"adapter_len": 5, "adapter_layers": 3} | options
    return scattered(peft.get_peft_model(model, peft.AdaptionPromptConfig(task_type="CAUSAL_LM", **options)))


@pytest.fixture
def exact(monkeypatch):
    """PEFT's softmax in float64: it casts to float32 whatever comes."""
    layer = pytest.importorskip("peft.tuners.adaption_prompt.layer")
    monkeypatch.setattr(layer, "F", types.SimpleNamespace(softmax=lambda x, dim, dtype=None: x.softmax(dim)))


@pytest.fixture
def batch():
    torch.manual_seed(2)
    ids = torch.randint(3, 50, (3, 8))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.where((torch.arange(8) > 3) & mask.bool(), ids, -100)}


def packed(batch):
    real = batch["attention_mask"].bool()
    positions = torch.cat([torch.arange(int(n)) for n in real.sum(1)])[None]
    packed = {"input_ids": batch["input_ids"][real][None], "labels": batch["labels"][real][None]}
    return packed | {"position_ids": positions, "use_cache": False}  # with a cache transformers reads no packing from positions


def gradients(model, batch):
    model.zero_grad()
    loss = model.train()(**batch).loss
    loss.backward()
    return [loss.detach(), *(p.grad.flatten().clone() for p in model.parameters() if p.requires_grad)]


def assert_same(mine, wanted, tolerance=1e-9):
    assert len(mine) == len(wanted) > 1 and all(t.any() for t in wanted)
    for a, b in zip(mine, wanted):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_one_layer_is_pefts(exact, kv_heads, bias):
    model = base(kv_heads, attention_bias=bias)
    wrapper = theirs(model).base_model.model.model.layers[3].self_attn
    hidden = torch.randn(2, 7, 32, dtype=torch.float64, requires_grad=True)
    tables = tuple(t.double() for t in model.model.rotary_emb(hidden, torch.arange(7)[None]))
    want = wrapper(hidden_states=hidden, position_embeddings=tables, attention_mask=None)[0]
    leaves = (hidden, wrapper.adaption_prompt, wrapper.adaption_gate)
    upstream = torch.randn_like(want)
    wanted = torch.autograd.grad(want, leaves, upstream)
    fp.optimize(model)
    assert isinstance(wrapper.model, attention_llama.FusedLlamaAttention)
    y = wrapper(hidden_states=hidden, position_embeddings=tables)[0]
    assert_same([y, *torch.autograd.grad(y, leaves, upstream)], [want, *wanted], 1e-12)


@pytest.mark.parametrize("form", [dict, packed])
@pytest.mark.parametrize("more", [{}, {"attention_bias": True}])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_whole_models(exact, batch, tmp_path, kv_heads, more, form):
    """Ours, adapted from PEFT's folder, and PEFT's own model with its layers fused, against PEFT's layers in an otherwise fused model (a
    padded or packed batch then reaches them as rows, as transformers' norms are no float64)."""
    model = theirs(base(kv_heads, **more))
    model.save_pretrained(tmp_path)
    report = fp.optimize(model, filter_fn=lambda module, name: not hasattr(module, "adaption_prompt"))
    assert len(report.skipped) == 3
    want = gradients(model, form(batch))
    mine = fp.load_adapter(base(kv_heads, **more), tmp_path)
    assert mine.fastpeft_plan.treatments["llm"] == (METHOD,) and fp.count(mine)["trainable"] == 3 * (5 * 32 + 1)
    fp.optimize(mine)
    assert_same(gradients(mine, form(batch)), want)
    assert {name for _, name in fp.optimize(model).swapped} == {"AdaptedAttention"}
    assert_same(gradients(model, form(batch)), want)


def test_against_peft_alone(batch):
    """transformers' norms and loss, and PEFT's softmax, are in float32: no more than that can be asked for."""
    model = theirs(base())
    want = gradients(model, batch)
    fp.optimize(model)
    assert (
        isinstance(model.base_model.forward.__self__, FusedLlamaForCausalLM)
        and model.base_model.forward.__func__ is FusedLlamaForCausalLM.forward
    )
    assert_same([t.double() for t in gradients(model, batch)], [t.double() for t in want], 1e-5)
    fp.restore(model)
    assert_same(gradients(model, batch), want, 1e-15)
    assert model.base_model.forward.__func__ is modeling_llama.LlamaForCausalLM.forward


def test_adapters_of_peft_come_and_go(batch):
    """PEFT keeps the layers of adapters that are not in use outside the model, where optimize does not see them."""
    peft = pytest.importorskip("peft")
    model = theirs(base())
    fp.optimize(model)
    first = gradients(model, batch)
    model.add_adapter("other", peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=2, task_type="CAUSAL_LM"))
    model.set_adapter("other")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "adaption" in name:
                p += 0.5 * torch.randn_like(p)
    second = gradients(model, batch)
    fp.restore(model)
    assert_same([t.double() for t in gradients(model, batch)], [t.double() for t in second], 1e-5)
    fp.optimize(model)
    assert_same(gradients(model, batch), second, 1e-6)
    with model.disable_adapter():
        torch.testing.assert_close(model.eval()(**batch).loss, base().eval()(**batch).loss.double(), rtol=1e-5, atol=0)
    model.set_adapter("default")
    assert_same(gradients(model, batch), first, 1e-15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(batch, dtype):
    """No further from float64 than PEFT in the same dtype, up to a factor; also where PEFT's layers run inside a fused model."""
    want = gradients(theirs(base()), batch)
    exact, model = theirs(base(dtype=dtype)), theirs(base(dtype=dtype))
    error = lambda got: max(float((g.double() - w).norm() / w.norm()) for g, w in zip(got, want))  # noqa: E731
    allowed = 3 * max(error(gradients(exact, batch)), float(torch.finfo(dtype).eps))
    fp.optimize(model, filter_fn=lambda module, name: not hasattr(module, "adaption_prompt"))
    assert error(gradients(model, batch)) < allowed
    fp.optimize(model)
    assert error(gradients(model, batch)) < allowed
    mine = scattered(fp.adapt(base(dtype=dtype), llm=METHOD))
    assert {p.dtype for p in mine.parameters() if p.requires_grad} == {torch.float32}
    with torch.no_grad():
        for a, b in zip((p for p in mine.parameters() if p.requires_grad), (p for p in exact.parameters() if p.requires_grad)):
            a.copy_(b.view(a.shape))
    assert error(gradients(mine, batch)) < allowed


def test_starts_from_the_base_model(batch):
    assert torch.equal(fp.adapt(base(), llm=METHOD).eval()(**batch).loss, fp.adapt(base(), "F").eval()(**batch).loss)


def test_peft_reads_what_fastpeft_writes(batch, tmp_path):
    peft = pytest.importorskip("peft")
    model = scattered(fp.adapt(base(), llm=METHOD)).eval()
    fp.save_adapter(model, tmp_path)
    again = peft.PeftModel.from_pretrained(base(), tmp_path / "llm").eval()
    mine = {name: t.view(-1) for name, t in METHOD.tensors(model, PARTS[0]).items()}
    found = {n: p.detach().view(-1) for n, p in again.named_parameters() if "adaption" in n}
    assert mine.keys() == found.keys() and all(torch.equal(mine[name], found[name]) for name in mine)
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits, rtol=1e-5, atol=1e-5)
    other = fp.load_adapter(base(), tmp_path).eval()
    assert torch.equal(other(**batch).logits, model(**batch).logits)
    fp.load_adapter(model, tmp_path)  # the same options: into what is there
    with pytest.raises(ValueError, match=r"options included: llm's AdaptionPrompt has adapter_len=\d+ not 4"):
        fp.load_adapter(fp.adapt(base(), llm=fp.AdaptionPrompt(adapter_len=4)), tmp_path)
    with pytest.raises(ValueError, match="no weight can take in AdaptionPrompt of llm"):
        fp.merge(model)
    plain = base().eval()(**batch).logits
    fp.plan.detach(model)
    torch.testing.assert_close(model(**batch).logits, plain, rtol=1e-5, atol=1e-5)
    assert not fp.restore(model)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}])
@pytest.mark.parametrize("of", ["fastpeft", "peft"])
def test_generation(batch, tmp_path, of, how):
    model = theirs(base()).eval()
    ask = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"].flip(1)}
    how = {"max_new_tokens": 7, "pad_token_id": 0, "eos_token_id": None} | how
    want = model.generate(**ask, **how)
    if of == "fastpeft":
        model.save_pretrained(tmp_path)
        model = fp.load_adapter(base(), tmp_path).eval()
    fp.optimize(model)
    assert torch.equal(model.generate(**ask, **how), want)
    assert torch.equal(model.generate(**ask, **how, use_cache=False), want)


def test_in_generation_the_prompt_is_projected_once(monkeypatch):
    model, seen = scattered(fp.adapt(base(), llm=METHOD)).eval(), []
    right = attention_llama.project_together
    monkeypatch.setattr(attention_llama, "project_together", lambda linears, x: seen.append(x.shape[1]) or right(linears, x))
    cache = DynamicCache()
    with torch.no_grad():
        for _ in range(3):
            model(input_ids=torch.tensor([[4, 5]]), past_key_values=cache)
    assert seen.count(5) == 3 and len(cache.prompts) == 3
    with torch.no_grad():
        want = model(input_ids=torch.tensor([[4, 5]]), past_key_values=cache).logits
        for block in (layer.self_attn.adaption for layer in model.model.layers[1:]):
            block.prompt = torch.nn.Parameter(0 * block.prompt)  # another prompt is another one's keys
        assert not torch.equal(model(input_ids=torch.tensor([[4, 5]]), past_key_values=cache).logits, want)


BESIDE = {
    "LoRA": fp.LoRA(r=2, target_modules=("k_proj", "v_proj", "o_proj")),
    "IA3": fp.IA3(),
    "PTv2": fp.PTv2(num_virtual_tokens=3),
    "Excitor": fp.Excitor(r=2, gate_std=0.5),
}


@pytest.mark.parametrize("more", BESIDE)
def test_beside_other_methods(more):
    """One layer against its equations: the prompt passes the projections with all that is attached to them."""
    model = fp.adapt(base(), llm=(METHOD, BESIDE[more]))
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p) if p.requires_grad else 0
    layer = model.model.layers[3].self_attn
    hidden = torch.randn(2, 6, 32, dtype=torch.float64)
    tables = tuple(t.double() for t in model.model.rotary_emb(hidden, torch.arange(6)[None]))
    prefix = model.model.prefix_encoder()[3] if more == "PTv2" else None
    block = layer.adaption
    y = layer(hidden, position_embeddings=tables, prefix=prefix)[0]
    layer.adaption = None
    plain = layer(hidden, position_embeddings=tables, prefix=prefix)[0]
    split = lambda t: t.unflatten(-1, (-1, 8)).transpose(-3, -2)  # noqa: E731
    q, _ = modeling_llama.apply_rotary_pos_emb(*[split(layer.q_proj(hidden))] * 2, *tables)
    k, v = (split(linear(block.prompt)).repeat_interleave(2, 0) for linear in (layer.k_proj, layer.v_proj))
    read = ((q @ k.mT / 8**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(y, plain + layer.o_proj(block.gate * read), rtol=1e-10, atol=1e-12)


def test_counts_and_layers():
    model = fp.adapt(fp.build("llama-7b", device="meta"), "AdaptionPrompt")
    assert fp.count(model)["trainable"] == 30 * (10 * 4096 + 1)  # LLaMA-Adapter's 1.2 M
    tiny = fp.adapt(fp.build("llama-tiny"), "AdaptionPrompt")
    assert [hasattr(layer.self_attn, "adaption") for layer in tiny.model.layers] == [False, False, True, True]


def test_what_is_kept_for_backward():
    """Beyond a frozen model's: one more output of attention a layer, with its lse, and nothing that grows with the batch of prompts."""

    def saved(plan):
        options = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 3, "pretrained": False}
        model = scattered(fp.adapt(fp.build("llama-tiny", **options), plan)).train()
        embeds = torch.randn(2, 64, 256, requires_grad=True)
        with measure(model) as cost:
            model(inputs_embeds=embeds, labels=torch.full((2, 64), 3)).loss.backward()
        return cost.saved_bytes

    read, lse, prompts = 128 * 256, 128 * 4, 3 * 10 * 256
    assert 0 < saved("AdaptionPrompt") - saved("F") <= 4 * (read + lse + prompts + 1)


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"adapter_len": 0}, "adapter_len must be a positive integer, not 0"),
        ({"adapter_layers": True}, "adapter_layers must be a positive"),
    ],
)
def test_bad_options(bad, message):
    with pytest.raises(ValueError, match=message):
        fp.AdaptionPrompt(**bad)


def test_what_it_is_not_for(miss):
    with pytest.raises(ValueError, match=r"adapter_layers is 5, and part 'llm' has 4 layers"):
        fp.adapt(base(), llm=fp.AdaptionPrompt(adapter_layers=5))
    with pytest.raises(ValueError, match=r"not defined for part 'jtm': it needs the attention of a LLaMA"):
        fp.adapt(miss.build(), "F/AdaptionPrompt/F")
    with pytest.raises(ValueError, match=r"target_modules='attn' is not supported"):
        fp.AdaptionPrompt.from_peft({"target_modules": "attn", "adapter_len": 2, "adapter_layers": 2})
    with pytest.raises(ValueError, match=r"adapter_layers is missing"):
        fp.AdaptionPrompt.from_peft({"adapter_len": 2, "adapter_layers": None})


def test_a_gpt2s_stays_as_it_is():
    peft = pytest.importorskip("peft")
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=30, n_positions=20))
    model = theirs_of(peft, model)
    want = model.eval()(input_ids=torch.tensor([[4, 5, 6]])).logits
    fp.optimize(model)
    torch.testing.assert_close(model(input_ids=torch.tensor([[4, 5, 6]])).logits, want, rtol=1e-5, atol=1e-6)


def theirs_of(peft, model):
    return scattered(peft.get_peft_model(model, peft.AdaptionPromptConfig(adapter_len=2, adapter_layers=1, task_type="CAUSAL_LM")))
