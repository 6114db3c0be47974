"""Samples that share prefixes in the fused LLaMA: losses and gradients of every method, as of each sample alone, in float64."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fastpeft as fp
from fastpeft.cost import memory_budget
from fastpeft.data.shared_prefix import most_shared, share
from fastpeft.fused.head.outputs import lean_logits
from fastpeft.verify.baseline import scatter_adapters, without_dropout

SHAPE = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 50}
PLANS = ["T", "LoRA", "IA3", "Prefix", "PTv2", "LayerNorm", "Attention", "FFN", "IA3+LoRA", "Excitor", "RepAdapter", "AdaptionPrompt"]


def fused(plan, kv_heads=2, dtype=torch.float64):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=kv_heads, initializer_range=0.2)).to(dtype)
    fp.optimize(model)
    fp.adapt(model, plan)
    return scatter_adapters(without_dropout(model))


def samples():
    """Three that go on from nine tokens, two that go on from three; the second of these begins a conversation that the first ends early."""
    torch.manual_seed(2)
    start, other = torch.randint(3, 50, (9,)), torch.randint(3, 50, (5,))
    ids = [torch.cat([start, torch.randint(3, 50, (n,))]) for n in (5, 3, 7)]
    ids += [torch.cat([other, torch.randint(3, 50, (n,))]) for n in (2, 4)]
    return [(t, t.masked_fill(torch.arange(len(t)) < len(t) - 2, -100)) for t in ids]


def row_of(samples):
    order, lengths = share([t.tolist() for t, _ in samples], [most_shared(y, len(y)) for _, y in samples], worth=1)
    ids, labels = (torch.cat([samples[i][which][n:] for i, n in zip(order, lengths)])[None] for which in (0, 1))
    positions = torch.cat([torch.arange(n, len(samples[i][0])) for i, n in zip(order, lengths)])[None]
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "prefix_lengths": torch.tensor(lengths)}


def run(model, *batches):
    """The mean of the batches' losses by their labelled tokens, all gradients."""
    model.zero_grad()
    items = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    total = sum(model(**batch).loss * n / sum(items) for batch, n in zip(batches, items))
    total.backward()
    return total.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def alone(model, samples):
    return run(model, *({"input_ids": t[None], "labels": y[None]} for t, y in samples))


def close(got, want, tolerance=1e-9):
    (loss, grads), (true_loss, exact) = got, want
    assert abs(float(loss - true_loss)) <= tolerance * abs(float(true_loss)) and grads.keys() == exact.keys()
    for name in exact:
        assert float((grads[name] - exact[name]).norm()) <= tolerance * float(exact[name].norm()), name


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("plan", PLANS)
def test_every_method(plan, lean):
    """Whoever reads logits or not: the last layer then computes labelled positions alone."""
    model, batch = fused(plan), row_of(samples())
    assert batch["prefix_lengths"].tolist().count(0) == 2 and batch["input_ids"].numel() == 58 - 9 - 9 - 5
    want = alone(model, samples())
    if lean:
        with lean_logits(model):
            close(run(model, batch), want)
    else:
        close(run(model, batch), want)
        assert model(**batch).logits.shape == (1, 35, 50)


@pytest.mark.parametrize("how", ["checkpointing", "memory budget", "hooks", "savings off", "evaluation"])
def test_with_what_else_there_is(how):
    model, batch, want = fused("LoRA"), row_of(samples()), alone(fused("LoRA"), samples())
    if how == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    elif how == "memory budget":
        found = memory_budget.profile_activations(model, lambda: model(**batch).loss)
        memory_budget.apply(model, [name for layer in found.layers.values() for name in layer.pieces], list(found.layers)[:1])
    elif how == "hooks":
        model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: None)
    elif how == "evaluation":
        model.eval()
    with lean_logits(model), fp.without(*(("remake", "labelled") if how == "savings off" else ())):
        close(run(model, batch), want)


def test_in_bfloat16():
    """As near to the float32 model's as separate samples are."""
    exact = alone(fused("LoRA", dtype=torch.float32), samples())
    model = fused("LoRA", dtype=torch.bfloat16)
    errors = []
    for loss, grads in (alone(model, samples()), run(model, row_of(samples()))):
        errors.append([float((grads[name].float() - exact[1][name]).norm() / exact[1][name].norm()) for name in grads])
        assert abs(float(loss - exact[0])) <= 2e-2
    assert sum(errors[1]) <= 1.2 * sum(errors[0])


def test_turns_of_one_conversation():
    """Each turn a sample, the turns before it its beginning, whose answers are labelled where they were asked."""
    torch.manual_seed(4)
    ids, ends = torch.randint(3, 50, (24,)), (8, 16, 24)
    turns = [(ids[:end], ids[:end].masked_fill(torch.arange(end) < end - 3, -100)) for end in ends]
    batch, model = row_of(turns), fused("LoRA")
    assert batch["prefix_lengths"].tolist() == [0, 7, 15] and batch["input_ids"].numel() == 26
    close(run(model, batch), alone(model, turns))


def test_what_is_shared_is_kept_once():
    """Bytes kept for backward by a layer grow with the row's tokens, not with the samples'."""
    torch.manual_seed(1)
    start = torch.randint(3, 50, (60,))
    many = [torch.cat([start, torch.randint(3, 50, (4,))]) for _ in range(5)]
    many = [(t, t.masked_fill(torch.arange(64) < 62, -100)) for t in many]
    model, kept = fused("LoRA", dtype=torch.float32), {}
    padded = {"input_ids": torch.stack([t for t, _ in many]), "labels": torch.stack([y for _, y in many])}
    for name, batch in (("shared", row_of(many)), ("separate", padded)):
        with fp.cost.profile.measure(model) as cost, lean_logits(model):
            model(**batch).loss.backward()
        kept[name] = cost.saved_bytes
    assert kept["shared"] < kept["separate"] * 0.35  # 80 tokens in place of 320, and the labelled ones of the last layer


BAD = [
    ({"attention_mask": torch.ones(1, 35, dtype=torch.int64)}, "go without attention_mask"),
    ({"use_cache": True}, "go without a cache"),
    ({"position_ids": None}, "one row of tokens with position_ids"),
    ({"position_ids": torch.arange(35)[None]}, "do not say the same"),
    ({"prefix_lengths": torch.tensor([0, 3])}, "do not say the same"),
]


@pytest.mark.parametrize("change, said", BAD, ids=[said for _, said in BAD])
def test_what_cannot_be(change, said):
    with pytest.raises(ValueError, match=said):
        fused("LoRA")(**row_of(samples()) | change)


def test_one_prefix_is_of_one_modality():
    model, batch = fused("MMAdapter"), row_of(samples())
    embeds = tuple(torch.randn(2, 32, dtype=torch.float64))
    root = (batch["prefix_lengths"] == 0).cumsum(0) - 1
    model(**batch, modality=root, modality_embeds=embeds).loss.backward()
    with pytest.raises(ValueError, match="shares a prefix with one of another modality"):
        model(**batch, modality=torch.arange(5) % 2, modality_embeds=embeds)


def test_only_fused_stacks_take_prefixes():
    """A stack, or an attention layer, that fastpeft does not run would take a branch for a sample by itself, without a word."""
    torch.manual_seed(0)
    for left in ("model", "model.layers.1.self_attn"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPE)).train()
        fp.optimize(model, filter_fn=lambda module, name, left=left: name != left)
        with pytest.raises(ValueError, match=r"fused stack|go without attention of somebody else's"):
            model(**row_of(samples()))


@pytest.mark.parametrize("name", ["llava-med-tiny", "lavin-tiny", "excitor-tiny"])
def test_restored_models_take_none(name):
    model, ids = fp.build(name, pretrained=False), torch.randint(4, 200, (1, 9))
    fp.restore(model)
    row = {"position_ids": torch.tensor([[*range(5), *range(2, 6)]]), "prefix_lengths": torch.tensor([0, 2])}
    with pytest.raises(ValueError, match=r"call fastpeft.optimize\(model\)"):
        model(input_ids=ids, labels=ids, **row)
    with pytest.raises(ValueError, match=r"call fastpeft.optimize\(model\)"):
        model.generate(ids, attention_mask=torch.ones_like(ids), prefix_length=4, max_new_tokens=1)


def test_in_transformers_trainer(tmp_path):
    """SharedPrefixCollator as data_collator: the losses of separate samples, on transformers' model and on an optimised one."""
    from transformers import Trainer, TrainingArguments

    from fastpeft.data import SharedPrefixCollator

    def losses(collate, optimized):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, use_cache=False))
        if optimized:
            fp.optimize(model)
        told = {"output_dir": str(tmp_path), "max_steps": 3, "logging_steps": 1, "report_to": [], "save_strategy": "no", "seed": 1}
        told |= {"per_device_train_batch_size": 5, "use_cpu": True, "learning_rate": 1e-2, "disable_tqdm": True}
        data = [{"input_ids": t.tolist(), "labels": y.tolist()} for t, y in samples()]
        trainer = Trainer(model, TrainingArguments(**told), data_collator=collate, train_dataset=data)
        trainer.train()
        return [row["loss"] for row in trainer.state.log_history if "loss" in row]

    def padded(items):
        pad = torch.nn.utils.rnn.pad_sequence
        ids, labels = ([torch.tensor(item[name]) for item in items] for name in ("input_ids", "labels"))
        mask = pad([torch.ones_like(t) for t in ids], batch_first=True)
        labels = pad(labels, batch_first=True, padding_value=-100)
        return {"input_ids": pad(ids, batch_first=True), "labels": labels, "attention_mask": mask}

    want = losses(padded, False)
    for optimized in (False, True):
        collate = SharedPrefixCollator(worth=1)
        assert losses(collate, optimized) == pytest.approx(want, rel=1e-4) and collate.saved.shared > 0
