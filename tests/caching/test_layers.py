"""optimize(model, cache_layers=...): losses, logits and gradients as without, lower layers that run once for a sequence, what ends it."""

from __future__ import annotations

import copy
import json
import pickle
import warnings

import peft
import pytest
import torch
import transformers as tf
from PIL import Image
from torch import nn
from vision_models import TEXT, images
from vision_models import build as build_with_images

import fastpeft as fp
from fastpeft.caching import layer_calls, layers, memory
from fastpeft.caching.layers import layer_caches
from fastpeft.runs.options import DataOptions
from fastpeft.runs.train import train_run
from fastpeft.static_shapes import static_shapes

DEEP = TEXT | {"num_hidden_layers": 4}
DECODERS = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**DEEP)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**DEEP)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**DEEP, sliding_window=8, query_pre_attn_scalar=8)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**DEEP, sliding_window=6)),
}
SAMPLES = [torch.randint(3, 90, (n,), generator=torch.Generator().manual_seed(n)) for n in (5, 9, 12, 7)]
LONG = [[0, 1, 2], [2, 0, 1], [0, 3, 2], [3, 2], [0, 2]]  # all of 12 tokens; one new in the third


@pytest.fixture(autouse=True)
def untimed(monkeypatch):
    """What these models compute takes less than reading it."""
    monkeypatch.setattr(layer_calls, "TIMED", 0)


def adapted(name: str, lowest: int = 2) -> nn.Module:
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=2,
        target_modules=["q_proj", "v_proj", "down_proj"],
        layers_to_transform=list(range(lowest, 4)),
        init_lora_weights=False,
    )
    return peft.get_peft_model(DECODERS[name](), config).double().train()


def pair(name: str, **options) -> tuple[nn.Module, nn.Module]:
    """(without, with) a cache."""
    without = adapted(name)
    kept = copy.deepcopy(without)
    fp.optimize(without)
    fp.optimize(kept, cache_layers="1GB", **options)
    return without, kept


def padded(rows: list[int], side: str = "right", length: int = 0) -> dict[str, torch.Tensor]:
    length = length or max(len(SAMPLES[i]) for i in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for b, i in enumerate(rows):
        own = slice(0, len(SAMPLES[i])) if side == "right" else slice(length - len(SAMPLES[i]), length)
        ids[b, own], mask[b, own] = SAMPLES[i], 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def packed(rows: list[int]) -> dict:
    ids = torch.cat([SAMPLES[i] for i in rows])[None]
    positions = torch.cat([torch.arange(len(SAMPLES[i])) for i in rows])[None]
    return {"input_ids": ids, "position_ids": positions, "labels": ids, "use_cache": False}


def results(model: nn.Module, batch: dict) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    output = model(**batch)
    output.loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"loss": output.loss.detach()} | ({} if output.logits is None else {"logits": output.logits.detach()[:]})


def assert_same(without: nn.Module, kept: nn.Module, batch: dict, exactly: bool = True) -> None:
    expected, found = results(without, batch), results(kept, batch)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        if exactly:
            assert torch.equal(value, found[name]), name
        else:
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("name, lean", [("llama", False), ("llama", True), ("qwen3", True), ("gemma3", False), ("mistral", False)])
def test_bits_are_those_without_a_cache_in_any_company(name, lean):
    without, kept = pair(name, lean_logits=lean)
    fp.optimize(without, lean_logits=lean)
    (cache,) = layer_caches(kept)
    for side in ("right", "left"):
        for rows in LONG:
            assert_same(without, kept, padded(rows, side))
    assert cache.computed <= 9 and cache.computed + cache.reused == 26, cache.note()  # each of 4 samples about once, on each side
    assert not cache.passed


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_padding_behind_a_sample_may_be_longer_or_shorter(name):
    without, kept = pair(name)
    (cache,) = layer_caches(kept)
    assert_same(without, kept, padded([0, 1], length=14))
    assert_same(without, kept, padded([0, 1], length=11), exactly=False)  # padding is kept up to the longest; lengths round differently
    assert_same(without, kept, padded([1], length=9), exactly=False)
    assert (cache.computed, cache.reused) == (2, 3), cache.note()
    assert_same(without, kept, padded([0, 1], length=16))
    assert_same(without, kept, padded([1, 0], length=16), exactly=False)
    assert (cache.computed, cache.reused) == (4, 5), cache.note()


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_packed_samples_are_known_each_by_itself(name):
    without, kept = pair(name)
    (cache,) = layer_caches(kept)
    for rows in ([0, 1, 2], [2, 0], [1], [3, 1, 0, 2], [3, 0]):  # one row rounds by its length
        assert_same(without, kept, packed(rows), exactly=False)
    assert cache.reused >= 5
    assert not cache.passed


def test_packed_positions_mean_nothing_where_a_cache_of_keys_is_made():
    without, kept = pair("qwen3")
    (cache,) = layer_caches(kept)
    batch = {name: value for name, value in packed([0, 1]).items() if name != "use_cache"}
    assert_same(without, kept, batch)
    assert cache.computed == 0
    assert any("use_cache=False" in reason for reason in cache.passed)


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen3_vl"])
def test_images_are_part_of_what_enters(name, monkeypatch):
    monkeypatch.setitem(TEXT, "num_hidden_layers", 3)
    model, batch = build_with_images(name)
    model.requires_grad_(False)
    stack = model.model.language_model
    for parameter in stack.layers[1:].parameters():
        parameter.requires_grad_(True)
    for parameter in model.parameters():  # Gemma 3's projection of images starts at zero
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    kept = copy.deepcopy(model)
    fp.optimize(model)
    fp.optimize(kept, cache_layers="1GB", cache_images="1GB")
    (cache,) = layer_caches(kept)
    pixels = images(4)
    for mix in ([0, 1], [0, 1], [2, 1], [2, 1], [0, 1]):
        assert_same(model, kept, batch(pixels[mix]), exactly=False)
    assert cache.reused >= 6, cache.note()
    assert not cache.passed


def test_trained_below_or_random_or_watched_runs_the_model_itself():
    without, kept = pair("llama")
    (cache,) = layer_caches(kept)
    batch = padded([0, 1])
    handle = kept.base_model.model.model.layers[0].register_forward_hook(lambda *args: None)
    assert_same(without, kept, batch)
    handle.remove()
    for model in (without, kept):
        model.base_model.model.model.layers[1].input_layernorm.weight.requires_grad_(True)
    assert_same(without, kept, batch)
    for model in (without, kept):
        model.base_model.model.model.layers[1].input_layernorm.weight.requires_grad_(False)
    embeds = kept.get_input_embeddings()(batch["input_ids"]).requires_grad_()
    kept(inputs_embeds=embeds, attention_mask=batch["attention_mask"], labels=batch["labels"]).loss.backward()
    assert embeds.grad.abs().sum() > 0
    assert cache.computed == 0
    assert list(cache.passed) == [
        "0 has hooks",
        "1.input_layernorm.weight is trained",
        "what enters them needs a gradient",
    ]
    kept.eval()
    for model in (without, kept):
        model.eval()
        output = model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=3, do_sample=False)
    states = kept(**batch, output_hidden_states=True).hidden_states
    assert len(states) == 5 and len(output) == 2


def test_a_change_of_a_lower_weight_empties_it():
    without, kept = pair("qwen3")
    (cache,) = layer_caches(kept)
    batch = padded([0, 1])
    assert_same(without, kept, batch)
    for change in (lambda weight: weight.mul_(1.5), lambda weight: weight.data.mul_(0.5)):
        for model in (without, kept):
            with torch.no_grad():
                change(model.base_model.model.model.layers[0].mlp.up_proj.weight)
        assert_same(without, kept, batch)
    assert (cache.computed, cache.reused) == (6, 0)
    for model in (without, kept):
        model.float()
    assert_same(without, kept, batch)
    assert cache.computed == 8


def test_layers_taken_away_are_not_asked_for():
    without, kept = pair("qwen3")
    assert_same(without, kept, padded([0, 1]))
    for model in (without, kept):
        del model.base_model.model.model.layers[2:]
        model.config.num_hidden_layers = 2
        model.base_model.model.lm_head.weight.requires_grad_(True)
    assert_same(without, kept, padded([0, 1]))
    assert list(layer_caches(kept)[0].passed) == ["it has fewer layers than it had"]


def test_memory_is_bounded_and_says_so():
    without = adapted("llama")
    kept = copy.deepcopy(without)
    fp.optimize(without)
    room = 8 * 32 * (5 + 9)  # two samples without padding
    fp.optimize(kept, cache_layers=str(room))
    (cache,) = layer_caches(kept)
    for rows in ([0], [1], [2], [0], [1], [2]):
        kept(**padded(rows))
        assert cache.kept.bytes <= room
    assert (cache.computed, cache.reused) == (4, 2)
    assert "2 times no room" in cache.note()
    for _ in range(3 * memory.IDLE):  # nobody asks for the others
        kept(**padded([2]))
    assert_same(without, kept, padded([2]))
    assert cache.kept.evicted and "evicted" in cache.note()


def test_files_serve_later_models_and_not_other_weights(tmp_path):
    without, kept = adapted("qwen3"), adapted("qwen3")
    again, other = copy.deepcopy(kept), copy.deepcopy(kept)
    fp.optimize(without)
    folder = tmp_path / "states"
    fp.optimize(kept, cache_layers=folder)
    assert_same(without, kept, padded([0, 1], length=12))
    fp.optimize(kept, cache_layers=False)
    fp.optimize(again, cache_layers=folder)
    (cache,) = layer_caches(again)
    assert_same(without, again, padded([2]))  # the first call of a process is computed
    assert_same(without, again, padded([1, 0], length=11))
    assert cache.loaded == 4 and cache.reused == 2, cache.note()  # each with its padding
    with torch.no_grad():
        other.base_model.model.model.layers[1].mlp.up_proj.weight.mul_(2)
    fp.optimize(other, cache_layers=folder)
    other(**padded([2]))
    other(**padded([1, 0], length=11))
    assert layer_caches(other)[0].loaded == 0


def test_gradient_checkpointing_and_gradients_asked_for_by_hooks():
    without, kept = pair("llama")
    for model in (without, kept):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        model.enable_input_require_grads()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            assert_same(without, kept, padded([0, 1]))
    (cache,) = layer_caches(kept)
    assert cache.reused == 2, cache.note()


def test_copies_pickles_and_the_way_back():
    without, kept = pair("qwen3")
    assert_same(without, kept, padded([0, 1]))
    copied, loaded = copy.deepcopy(kept), pickle.loads(pickle.dumps(kept))
    assert layer_caches(copied)[0].stack is copied.base_model.model.model and layer_caches(copied)[0].computed == 0
    assert not layer_caches(loaded)
    assert_same(without, copied, padded([0, 1]))
    torch.testing.assert_close(loaded(**padded([0, 1])).loss, without(**padded([0, 1])).loss, rtol=1e-5, atol=0)
    assert layer_caches(copied)[0].computed == 2
    assert layer_caches(kept)[0].computed == 2
    fp.restore(kept)
    assert not layer_caches(kept)
    assert not any("layer_cache" in name for module in kept.modules() for name in vars(module))


def test_it_ends_itself_where_reading_takes_longer(monkeypatch):
    monkeypatch.setattr(layers, "TIMED", 1)
    without, kept = pair("llama")
    (cache,) = layer_caches(kept)
    cache.timed("computing", 1.0, 10)
    cache.timed("reading", 2.0, 10)
    assert_same(without, kept, padded([0, 1]))
    assert "reading takes" in next(iter(cache.passed)) and cache.computed == 0


@pytest.mark.parametrize("where, message", [(3, "a size such as"), ("12 parrots", "cache_layers"), ("", "a folder, not")])
def test_bad_places_are_named(where, message):
    with pytest.raises((ValueError, TypeError), match=message):
        fp.optimize(adapted("llama"), cache_layers=where)


def test_the_report_says_what_is_saved_or_why_nothing_is():
    report = fp.optimize(adapted("llama"), cache_layers="1GB")
    assert any("after 2 of 4 layers are kept" in note and "of the layers' forward" in note for note in report.notes)
    report = fp.optimize(adapted("llama", lowest=0), cache_layers="1GB")
    assert any("are not kept: layers.0.self_attn.q_proj.lora_A.default.weight is trained" in note for note in report.notes), report.notes
    report = fp.optimize(nn.Linear(2, 2), cache_layers="1GB")
    assert any("no stack of decoder layers" in note for note in report.notes)


def test_estimate_leaves_the_kept_layers_out():
    plan, name = "Excitor", "llama-tiny"
    every, known = (fp.estimate(name, plan, batch_size=1, seq_len=16, cache_layers=kept) for kept in (False, True))
    assert known.flops_per_sample < 0.8 * every.flops_per_sample
    assert known.saved_bytes == every.saved_bytes
    assert any("layers 0 to 1 are not in the step" in note for note in known.notes)
    with pytest.raises(ValueError, match="cache_layers"):
        fp.estimate(name, plan, cache_layers=True, optimized=False)


def test_our_own_runs_take_it_as_an_option(tmp_path):
    rows = []
    for number, words in enumerate(["Say hello.", "Name a bone of the arm.", "What is seen?"]):
        said = [{"from": "human", "value": words}, {"from": "gpt", "value": f"answer {number}"}]
        Image.new("RGB", (32, 32), (60 * number, 9, 9)).save(tmp_path / f"{number}.png")
        rows.append({"id": str(number), "image": f"{number}.png", "conversations": said})
    (tmp_path / "train.json").write_text(json.dumps(rows))
    summaries = {}
    for cache in (None, "1GB"):
        config = fp.TrainConfig(steps=4, batch_size=2, cache_layers=cache, progress=False)
        summaries[cache] = train_run("excitor-tiny", "F/Excitor", DataOptions(str(tmp_path)), config, evaluate=False)
    assert summaries["1GB"]["loss_last"] == pytest.approx(summaries[None]["loss_last"], rel=1e-6)
    notes = " ".join(summaries["1GB"]["notes"])
    assert "after 2 of 4 layers are kept" in notes
    assert "computed 3 times" in notes, notes


def test_a_stack_that_gets_its_tokens_by_position():
    config = tf.GPTNeoXConfig(vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    model = tf.GPTNeoXForCausalLM(config).double().train()
    model.gpt_neox.layers[0].requires_grad_(False)
    model.gpt_neox.embed_in.requires_grad_(False)
    kept = copy.deepcopy(model)
    fp.optimize(model)
    fp.optimize(kept, cache_layers="1GB")
    for rows in ([0, 1], [1, 0]):
        assert_same(model, kept, padded(rows), exactly=False)
    assert layer_caches(kept)[0].reused == 2


def test_replicas_of_data_parallel_run_their_own_layers():
    _, kept = pair("qwen3")
    (cache,) = layer_caches(kept)
    replica = cache.stack._replicate_for_data_parallel()
    assert cache.call(replica, {}) is None
    assert list(cache.passed) == ["a replica of the model runs"]


def test_a_step_that_a_graph_would_repeat_computes_every_layer():
    without, kept = pair("qwen3")
    (cache,) = layer_caches(kept)
    with static_shapes(object(), object()):
        assert cache.call(cache.stack, {}) is None
    assert "static shapes" in next(iter(cache.passed))
    assert_same(without, kept, padded([0, 1]))
    assert cache.computed == 2
