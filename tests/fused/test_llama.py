"""The fused LLaMA against transformers' own, in float64: losses, gradients, packing, masks, generation."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fastpeft as fp
from fastpeft.fused.head.outputs import lean_logits
from fastpeft.fused.layout import rows_layout

SHAPE = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 50}
PLANS = ["F", "T", "LoRA", "IA3", "Prefix", "PTv2", "LayerNorm", "Attention", "FFN", "IA3+LoRA", "IA3+PTv2", "LoRA+PTv2"]


def plain(kv_heads=4, **more):
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, num_key_value_heads=kv_heads, initializer_range=0.2, **more)
    model = LlamaForCausalLM(config).double().eval()
    for name, p in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(p, 1.0, 0.2)
    return model


def fused(kv_heads=4, plan=None, **more):
    model = plain(kv_heads, **more)
    fp.optimize(model)
    if plan is not None:
        fp.adapt(model, plan)
        randomise(model)
    return model


def randomise(model):
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn_like(p)


@pytest.fixture
def ragged():
    """Three samples of 7, 3 and 5 tokens: (ids, labels) each, the first two tokens unlabelled."""
    torch.manual_seed(2)
    samples = []
    for length in (7, 3, 5):
        ids = torch.randint(3, 50, (length,))
        samples.append((ids, torch.where(torch.arange(length) < 2, -100, ids)))
    return samples


def padded(samples, side="right"):
    most = max(len(ids) for ids, _ in samples)
    rows = []
    for ids, labels in samples:
        fill = (0, most - len(ids)) if side == "right" else (most - len(ids), 0)
        pad = torch.nn.functional.pad
        rows.append((pad(ids, fill), pad(torch.ones_like(ids), fill), pad(labels, fill, value=-100)))
    return dict(zip(("input_ids", "attention_mask", "labels"), map(torch.stack, zip(*rows))))


def packed(samples):
    ids, labels = (torch.cat([s[i] for s in samples])[None] for i in (0, 1))
    positions = torch.cat([torch.arange(len(s[0])) for s in samples])[None]
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def alone(model, samples):
    """Mean loss over labelled tokens, every sample by itself, and its gradients."""
    items = sum(int((labels[1:] != -100).sum()) for _, labels in samples)
    losses = [model(input_ids=i[None], labels=y[None]).loss * int((y[1:] != -100).sum()) / items for i, y in samples]
    return sum(losses)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# transformers' RMSNorm and loss are in float32 whatever the model's dtype: against it no more can be asked for
TRANSFORMERS = {"rtol": 1e-4, "atol": 1e-5}


def assert_same(mine, theirs, rtol=1e-9, atol=1e-11):
    assert mine.keys() == theirs.keys() and mine
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_full_gradients_equal_transformers(ragged, kv_heads):
    theirs, mine = plain(kv_heads), fused(kv_heads)
    batch = padded(ragged)
    assert_same(gradients(mine, mine.train()(**batch).loss), gradients(theirs, theirs(**batch).loss), **TRANSFORMERS)


@pytest.mark.parametrize("form", ["right", "left", "packed"])
@pytest.mark.parametrize("plan", PLANS[1:])
def test_batches_equal_samples_alone(ragged, plan, form):
    model = fused(2, plan)
    expected = gradients(model, alone(model, ragged))
    batch = packed(ragged) if form == "packed" else padded(ragged, form)
    assert_same(gradients(model, model.train()(**batch).loss), expected)
    with lean_logits(model):
        out = model(**batch)
    assert out.logits is None
    assert_same(gradients(model, out.loss), expected)


@pytest.mark.parametrize("plan", ["LoRA", "IA3", "PTv2", "LayerNorm"])
def test_equal_to_peft(ragged, plan):
    peft = pytest.importorskip("peft")
    kinds = {
        "LoRA": lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
        "IA3": lambda: peft.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
        ),
        "PTv2": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
        "LayerNorm": lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm", "norm"]),
    }
    torch.manual_seed(3)
    theirs = peft.get_peft_model(plain(), kinds[plan]()).double().eval()
    randomise(theirs)
    mine = fused()
    method = {"LoRA": fp.LoRA(r=4, lora_alpha=8), "PTv2": fp.PTv2(num_virtual_tokens=5)}.get(plan, plan)
    fp.adapt(mine, llm=method)
    named = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    pairs = []
    for name, p in mine.named_parameters():
        if not p.requires_grad:
            continue
        if plan == "PTv2":
            other = next(iter(named.values()))
        else:
            stem, leaf = name.rsplit(".", 1)
            other = next(q for n, q in named.items() if n.startswith(f"base_model.model.{stem}.") and (leaf in n or plan == "LayerNorm"))
        p.data.copy_(other.data.view_as(p))
        pairs.append((name, p, other))
    assert len(pairs) == len(named)
    batch = padded(ragged)
    assert gradients(mine, mine.train()(**batch).loss)
    loss = theirs(**batch).loss
    loss.backward()
    for name, p, other in pairs:
        torch.testing.assert_close(p.grad, other.grad.view_as(p), **TRANSFORMERS, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_logits_and_hidden_states(ragged, kv_heads):
    batch = padded(ragged)
    batch.pop("labels")
    theirs, mine = (m(**batch, output_hidden_states=True) for m in (plain(kv_heads), fused(kv_heads)))
    real = batch["attention_mask"].bool()
    assert len(mine.hidden_states) == len(theirs.hidden_states)
    for a, b in zip((mine.logits, *mine.hidden_states), (theirs.logits, *theirs.hidden_states)):
        torch.testing.assert_close(a[real], b[real], **TRANSFORMERS)


@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 3}, {"do_sample": True, "top_p": 0.75, "temperature": 0.7}, {"cache_implementation": "static"}]
)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_generation_equals_transformers(ragged, kv_heads, how):
    batch = padded(ragged, "left")
    batch.pop("labels")
    answers = []
    for model in (plain(kv_heads), fused(kv_heads)):
        torch.manual_seed(4)
        answers.append(model.generate(**batch, max_new_tokens=8, pad_token_id=0, eos_token_id=None, **how))
    assert torch.equal(*answers)


@pytest.mark.parametrize("plan", ["LoRA", "IA3", "PTv2"])
def test_cached_generation_equals_uncached(ragged, plan):
    model = fused(2, plan).eval()
    batch = padded(ragged, "left")
    batch.pop("labels")
    how = {"max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": None}
    cached = model.generate(**batch, **how)
    assert torch.equal(cached, model.generate(**batch, use_cache=False, **how))
    one = ragged[1][0][None]
    assert torch.equal(model.generate(one, attention_mask=torch.ones_like(one), **how)[0, 3:], cached[1, 7:])


def test_loss_over_items(ragged):
    theirs, mine = plain(), fused().train()
    batch = padded(ragged) | {"num_items_in_batch": 17}
    torch.testing.assert_close(mine(**batch).loss, theirs(**batch).loss.double(), **TRANSFORMERS)


def test_restore_gives_transformers_back(ragged):
    model, batch = fused(), padded(ragged)
    keys = list(model.state_dict())
    fp.restore(model)
    assert type(model) is LlamaForCausalLM and list(model.state_dict()) == keys == list(plain().state_dict())
    assert torch.equal(model(**batch).logits, plain()(**batch).logits)


def test_a_layer_left_alone_keeps_its_model():
    model = plain()
    report = fp.optimize(model, filter_fn=lambda module, name: name != "model.layers.1")
    assert dict(report.skipped)["model.layers.1"] == "left out by filter_fn" and "layers.1 inside" in dict(report.skipped)["model"]


def test_saved_bytes_of_a_layer():
    """6 C + 2 F elements a token and layer above the lowest trained parameter, and lse."""
    from fastpeft.cost.profile import measure

    def saved(layers):
        torch.manual_seed(0)
        config = LlamaConfig(**SHAPE | {"num_hidden_layers": layers, "hidden_size": 64, "intermediate_size": 160}, use_cache=False)
        model = LlamaForCausalLM(config)
        fp.optimize(model)
        fp.adapt(model, "F")
        embeds = torch.randn(2, 16, 64, requires_grad=True)
        with measure(model) as cost:
            model.train()(inputs_embeds=embeds, labels=torch.full((2, 16), 3)).loss.backward()
        return cost.saved_bytes

    per_token = (saved(3) - saved(2)) / 4 / 32
    assert per_token <= 1.05 * (6 * 64 + 2 * 160)


@pytest.mark.parametrize("lengths", [[3, 1, 4], [2, 2], [5], [0, 3]])
def test_rows_layout(lengths):
    x = torch.arange(1.0, 1 + sum(lengths))[:, None]
    layout = rows_layout(torch.tensor(lengths), x.device)
    table = layout.pad(x)
    assert table.shape == (len(lengths), max(lengths), 1) and torch.equal(layout.unpad(table), x)
    for row, length, part in zip(table, lengths, x.split(lengths)):
        assert torch.equal(row[:length], part) and not row[length:].any()


def test_named_sizes_and_overrides():
    assert fp.count(fp.build("llama-7b", device="meta"))["total"] == 6_738_415_616
    model = fp.build("llama-tiny", num_hidden_layers=2)
    assert len(model.model.layers) == 2
    with pytest.raises(ValueError, match="no depth"):
        fp.build("llama-tiny", depth=3)


def test_folder_round_trip(tmp_path):
    model = plain().float()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    loaded = fp.build(tmp_path)
    for name, p in copy.deepcopy(model).state_dict().items():
        assert torch.equal(loaded.state_dict()[name], p)
