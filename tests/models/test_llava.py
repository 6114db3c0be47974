"""LLaVA-Med: the paper's counts, and its forward against one written out by hand."""

import contextlib
import copy
import json

import pytest
import torch
from safetensors import safe_open
from transformers import LlavaConfig, LlavaForConditionalGeneration, MistralConfig

import fastpeft as fp
from fastpeft.fused.head.outputs import lean_logits
from fastpeft.models.llava import LlavaMedForConditionalGeneration, llava_med_config

ROWS = {  # Table 2 of the LayerNorm paper; its FFN rows count two of three matrices, ours all
    "F/F/LayerNorm/F": 262_144,
    "F/T/LayerNorm/T": 266_637_312,
    "LayerNorm/T/LayerNorm/T": 266_737_664,
    "Attention/F/Attention/F": 2_248_245_248,
    "F/T/LoRA/T": 276_369_408,
    "F/T/Prefix/T": 1_357_180_928,
    "F/F/FFN/F": 32 * 3 * 4096 * 11_008,
}


@pytest.mark.parametrize("plan", ROWS)
def test_trained_parameters(plan):
    model = fp.adapt(fp.build("llava-med", device="meta"), plan)
    counted = fp.count(model)
    assert counted["base"] == 7_045_826_560 and counted["trainable"] == ROWS[plan]
    assert sum(part["base"] for part in counted["parts"].values()) == counted["base"]


@pytest.fixture
def model():
    return fp.build("llava-med-tiny", dtype=torch.float64)


@pytest.fixture
def batch(model):
    """Two samples on one image and one without any: 16 image tokens each where there is one."""
    torch.manual_seed(0)
    ids = torch.randint(3, 400, (3, 22))
    ids[:2, 2:18] = model.config.image_token_index
    mask = torch.ones_like(ids)
    mask[1, 20:] = mask[2, 9:] = 0
    labels = torch.where((torch.arange(22) > 18) & mask.bool(), ids, -100)
    labels[2, 5:9] = ids[2, 5:9]
    pixels = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pixels, "image_index": torch.tensor([0, 0, -1])}


def by_hand(model, batch):
    tower = model.model.vision_tower
    states = tower(batch["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
    seen = model.model.multi_modal_projector.linear(states)
    text = model.model.language_model.embed_tokens(batch["input_ids"]).clone()
    for row, image in enumerate(batch["image_index"].tolist()):
        if image >= 0:
            text[row, 2:18] = seen[image]
    hidden = model.model.language_model(inputs_embeds=text, attention_mask=batch["attention_mask"]).last_hidden_state
    logits = model.lm_head(hidden)[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())


@pytest.mark.parametrize("plan", ["LoRA/T/LoRA/T", "F/T/Prefix/F", "Attention/F/FFN/F", "LayerNorm/T/LayerNorm/T", "T/T/T/T", "F/F/F/LoRA"])
def test_loss_and_gradients(model, batch, plan):
    fp.adapt(model, plan).train()
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.02 * torch.randn_like(p)
    grads = []
    for loss in (by_hand(model, batch), model(**batch).loss):
        model.zero_grad()
        loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {"loss": loss.detach()})
    assert grads[0].keys() == grads[1].keys()
    for name in grads[0]:
        torch.testing.assert_close(grads[1][name], grads[0][name], rtol=1e-8, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


def test_features_in_place_of_pixels(model, batch):
    want = model(**batch).loss
    batch["image_embeds"] = model.encode_images(batch.pop("pixel_values"))
    assert torch.equal(model(**batch).loss, want)


def test_generation_equals_decoding_step_by_step(model, batch):
    batch.pop("labels")
    one = {"input_ids": batch["input_ids"][:1, :19], "pixel_values": batch["pixel_values"]}
    answer = model.generate(**one, max_new_tokens=5, eos_token_id=None, do_sample=False)
    ids = one["input_ids"]
    for _ in range(5):
        ids = torch.cat([ids, model(input_ids=ids, pixel_values=one["pixel_values"]).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(answer, ids)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}])
def test_a_batch_of_distinct_images_generates_as_its_samples_alone(model, how):
    torch.manual_seed(3)
    how |= {"max_new_tokens": 4, "eos_token_id": None, "do_sample": False}
    pixels, texts = torch.randn(2, 3, 32, 32, dtype=torch.float64), [torch.randint(3, 400, (n,)) for n in (3, 5, 4)]
    index, pad = torch.tensor([1, -1, 0]), torch.nn.functional.pad
    rows, alone = [], []
    for text, image in zip(texts, index.tolist()):
        ids = text if image < 0 else torch.cat([text[:2], torch.full((16,), model.config.image_token_index), text[2:]])
        seen = {} if image < 0 else {"pixel_values": pixels[image, None]}
        alone.append(model.generate(ids[None], **seen, **how)[0, len(ids) :])
        rows.append(ids)
    fill = [(20 - len(ids), 0) for ids in rows]
    ids = torch.stack([pad(r, f) for r, f in zip(rows, fill)])
    mask = torch.stack([pad(torch.ones_like(r), f) for r, f in zip(rows, fill)])
    places = {"image_index": index, "image_mask": ids == model.config.image_token_index}
    together = model.generate(ids, attention_mask=mask, pixel_values=pixels, **places, **how)
    assert torch.equal(together[:, 20:], torch.stack(alone))


def test_wrong_number_of_image_tokens(model, batch):
    batch["input_ids"][0, 5] = 7
    with pytest.raises(ValueError, match="31 image tokens for 2 images of 16 patches"):
        model(**batch)


def test_folder_and_adapter_round_trip(model, batch, tmp_path):
    model.save_pretrained(tmp_path / "base")
    fp.adapt(model, "F/T/LoRA/T")
    fp.save_adapter(model, tmp_path / "adapter")
    other = fp.load_adapter(fp.build(tmp_path / "base", dtype=torch.float64), tmp_path / "adapter")
    assert torch.equal(other.eval()(**batch).loss, model.eval()(**batch).loss)


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("where", ["answers", "everywhere"])
def test_labels_and_logits_at_padding(model, batch, where, side, lean):
    """Against the decoder without us, whatever a label stands on."""
    model.model.language_model.requires_grad_(True)
    model.train()
    if side == "left":
        for name in ("input_ids", "attention_mask", "labels"):
            batch[name] = batch[name].flip(1)
        batch["labels"][(batch["attention_mask"].cumsum(1) == 1) & (batch["attention_mask"] == 1)] = -100
    if where == "everywhere":
        batch["labels"] = batch["input_ids"].clone()
    theirs = copy.deepcopy(model)
    fp.restore(theirs)
    batch["image_embeds"] = model.encode_images(batch.pop("pixel_values")).detach()
    with lean_logits(model) if lean else contextlib.nullcontext():
        found = [one(**batch) for one in (theirs, model)]
    for out in found:
        out.loss.backward()
    torch.testing.assert_close(found[1].loss, found[0].loss, rtol=1e-5, atol=1e-6)  # transformers' norms are in float32
    if lean:
        assert found[1].logits is None
    else:
        torch.testing.assert_close(found[1].logits, found[0].logits, rtol=1e-4, atol=1e-4)
    for (name, p), (_, q) in zip(model.named_parameters(), theirs.named_parameters()):
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_num_items_and_kept_positions(model, batch):
    model.train()
    items = int((batch["labels"][:, 1:] != -100).sum())
    torch.testing.assert_close(model(**batch, num_items_in_batch=2 * items).loss, model(**batch).loss / 2, rtol=1e-12, atol=0)
    labels, logits = batch.pop("labels"), model(**batch).logits
    keep = torch.tensor([[1, 4], [0, 8], [3, 2]])
    assert torch.equal(model(**batch, logits_to_keep=keep).logits, logits[torch.arange(3)[:, None], keep])
    assert torch.equal(model(**batch, logits_to_keep=labels > 0).logits, logits[labels > 0])


V1_5 = {  # CLIP at 336: 303,507,456; 1024 -> 4096 -> 4096; Mistral-7B: 7,241,732,096
    "F/F/LayerNorm/F": 32 * 2 * 4096,
    "F/T/F/F": 1024 * 4096 + 4096 + 4096 * 4096 + 4096,
    "F/F/F/T": 2 * 32_000 * 4096,
    "F/F/FFN/F": 32 * 3 * 4096 * 14_336,
    "F/F/Attention/F": 32 * (2 * 4096 + 2 * 1024) * 4096,
    "F/LoRA/F/F": 4 * (1024 + 4096 + 4096 + 4096),
    "F/F/PTv2/F": 5 * 32 * 2 * 1024,
}


@pytest.mark.parametrize("plan", V1_5)
def test_trained_parameters_of_v1_5(plan):
    counted = fp.count(fp.adapt(fp.build("llava-med-v1.5", device="meta"), plan))
    assert counted["base"] == 303_507_456 + V1_5["F/T/F/F"] + 7_241_732_096 and counted["trainable"] == V1_5[plan]
    assert sum(part["base"] for part in counted["parts"].values()) == counted["base"]


def test_v1_5_is_estimated():
    found, base = fp.estimate("llava-med-v1.5-tiny", "F/F/LoRA/F", batch_size=1, seq_len=60), fp.build("llava-med-v1.5-tiny", device="meta")
    assert found.weight_bytes >= 4 * fp.count(fp.adapt(base, "F/F/LoRA/F"))["base"] and found.saved_bytes > 0
    with pytest.raises(ValueError, match="image and answer alone take 17 tokens"):
        fp.estimate("llava-med-v1.5-tiny", "F/F/LoRA/F", batch_size=1, seq_len=16, answer_len=1)


def mistral(window, **more):
    tiny = llava_med_config("llava-med-v1.5-tiny")
    sizes = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    rope = {"rope_type": "default", "rope_theta": 1e6}
    text = MistralConfig(vocab_size=512, sliding_window=window, rope_parameters=rope, initializer_range=0.1, **sizes)
    kinds = {"image_token_index": -200, "image_seq_length": 16, "mm_projector_type": "mlp2x_gelu"}
    return LlavaConfig(vision_config=tiny.vision_config, text_config=text, **kinds | more)


@pytest.mark.parametrize(("window", "decoder"), [(None, "LlamaModel"), (8, "MistralModel")])
def test_mistral(window, decoder, tmp_path):
    """transformers' own LLaVA on Mistral; without a window ours is a LLaMA, with one it stays what it is, saved and loaded."""
    torch.manual_seed(0)
    theirs = LlavaForConditionalGeneration(mistral(window)).double().eval()
    own = LlavaMedForConditionalGeneration(mistral(window)).double().eval()
    own.load_state_dict(theirs.state_dict())
    own.save_pretrained(tmp_path / "base")
    model = fp.build(tmp_path / "base", dtype=torch.float64)
    assert type(model.model.language_model).__name__ == decoder
    ids, pixels = torch.randint(3, 500, (1, 30)), torch.randn(1, 3, 32, 32, dtype=torch.float64)
    ids[:, 2:18] = -200
    states = theirs.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    words, seen = theirs.get_input_embeddings()(ids.clamp(min=0)), theirs.model.multi_modal_projector(states)
    embeds = words.masked_scatter((ids == -200)[..., None], seen)
    want = theirs.lm_head(theirs.model.language_model(inputs_embeds=embeds).last_hidden_state)
    torch.testing.assert_close(model(input_ids=ids, pixel_values=pixels).logits, want, rtol=1e-5, atol=1e-6)  # norms are in float32
    answer = model.generate(ids, pixel_values=pixels, max_new_tokens=3, do_sample=False, eos_token_id=None)[:, 30:]
    told = ids
    for _ in range(3):
        told = torch.cat([told, model(input_ids=told, pixel_values=pixels).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(answer, told[:, 30:])
    if window is None:
        fp.adapt(model, "F/T/Prefix/F")
    else:
        with pytest.raises(ValueError, match="Prefix is not defined for a MistralModel"):
            fp.adapt(model, "F/T/Prefix/F")
        assert fp.count(fp.adapt(model, "F/T/LoRA/F"))["trainable"]


def test_a_folder_of_transformers_own_class(tmp_path):
    """llava-hf/llava-1.5-7b-hf's kind: other names of the weights, no mm_projector_type, and a number of places that nobody reads."""
    torch.manual_seed(0)
    tiny = llava_med_config("llava-med-tiny", text_config={"tie_word_embeddings": False})
    config = LlavaConfig(vision_config=tiny.vision_config, text_config=tiny.text_config, image_token_index=500, image_seq_length=576)
    theirs = LlavaForConditionalGeneration(config).double().eval()
    theirs.save_pretrained(tmp_path / "theirs")
    model = fp.build(tmp_path / "theirs", dtype=torch.float64).eval()
    assert model.config.image_seq_length == 16 and fp.count(fp.adapt(model, "F/T/LoRA/F"))["trainable"]
    ids, pixels = torch.randint(3, 490, (2, 30)), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    ids[:, 2:18] = 500
    want = theirs(input_ids=ids, pixel_values=pixels).logits
    torch.testing.assert_close(model(input_ids=ids, pixel_values=pixels).logits, want, rtol=1e-5, atol=1e-6)  # norms are in float32
    fp.merge(model).save_pretrained(tmp_path / "ours")
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "ours", dtype=torch.float64).eval()
    torch.testing.assert_close(again(input_ids=ids, pixel_values=pixels).logits, want, rtol=1e-5, atol=1e-6)
    settings = json.loads((tmp_path / "theirs" / "config.json").read_text())
    for change, said in (
        ({"projector_hidden_act": "relu"}, "projector_hidden_act 'relu' and multimodal_projector_bias True: the connectors known"),
        ({"vision_feature_layer": [-2, -3]}, r"vision_feature_layer \[-2, -3\]: LLaVA here reads one layer of a 'clip_vision_model'"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "an image encoder 'siglip_vision_model'"),
    ):
        (tmp_path / "theirs" / "config.json").write_text(json.dumps(settings | change))
        with pytest.raises(ValueError, match=said):
            fp.build(tmp_path / "theirs", device="meta")


@pytest.mark.parametrize(("layer", "strategy", "taken"), [(-1, "default", -1), (2, "default", 2), (0, "full", 0), (-2, "full", -2)])
def test_layers_and_class_token_of_clip(layer, strategy, taken):
    """mm_vision_select_layer and mm_vision_select_feature: any layer, with the class token or without."""
    model = fp.build("llava-med-tiny", dtype=torch.float64, vision_feature_layer=layer, vision_feature_select_strategy=strategy)
    pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    want = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[taken]
    torch.testing.assert_close(model.encode_images(pixels), want if strategy == "full" else want[:, 1:])


def test_attentions_are_passed_on(model, batch):
    model.set_attn_implementation("eager")
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    fp.restore(theirs)
    found = [one(**batch, output_attentions=True).attentions for one in (ours, theirs)]
    assert len(found[0]) == len(model.model.language_model.layers)
    for mine, own in zip(*found, strict=True):
        torch.testing.assert_close(mine, own, rtol=1e-5, atol=1e-6)  # transformers' norms are in float32


def test_each_part_saves_its_own_adapter(tmp_path):
    """The head lies beside the other parts, not around them, though its module is the whole model."""
    model = fp.adapt(fp.build("llava-med-tiny"), "IA3/LoRA/LoRA/LoRA")
    fp.save_adapter(model, tmp_path)
    for part, places in (("connector", ["linear"]), ("head", ["lm_head"]), ("llm", ["layers"]), ("vision", ["encoder"])):
        with safe_open(tmp_path / part / "adapter_model.safetensors", "pt") as file:
            assert {key.split(".")[2] for key in file.keys()} == set(places)  # noqa: SIM118
    with pytest.raises(ValueError, match="no linear layer or convolution of 'head' matches"):
        fp.adapt(fp.build("llava-med-tiny"), head=fp.LoRA(target_modules=["q_proj"]))


def test_what_a_configuration_cannot_say():
    with pytest.raises(ValueError, match="mm_projector_type 'qformer' is no connector known here"):
        fp.build("llava-med-tiny", mm_projector_type="qformer")
    with pytest.raises(ValueError, match="a LLaVA-Med has no mm_projector; overrides are"):
        fp.build("llava-med-tiny", mm_projector="linear")
