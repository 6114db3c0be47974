"""Official MISS/BLIP state dicts <-> transformers: the same tensors, the official computation, every fault named."""

import json
import os

import pytest
import torch
from official_miss import (
    DEPTH,
    GRID,
    HEADS,
    LAYERS,
    PATCH,
    POSITIONS,
    SIZE,
    VOCAB,
    WIDTH,
    facts,
    forward,
    load,
    official_state,
    same,
    write,
)
from safetensors.torch import load_file
from transformers import BlipForQuestionAnswering

import fastpeft
from fastpeft.convert import blip_names as official
from fastpeft.convert.formats import blip_to_transformers, convert, transformers_to_blip
from fastpeft.data import Preprocess
from fastpeft.data.images import CLIP_MEAN, CLIP_STD
from fastpeft.models.miss import miss_config
from fastpeft.runs.vqa import preprocess_for


@pytest.fixture
def checkpoint(tmp_path):
    return write(tmp_path / "official.pth", {"model": official_state(), "epoch": 3})


def test_forward_equals_official(tmp_path):
    state = official_state(dtype=torch.float64)
    convert(write(tmp_path / "a.pth", state), tmp_path / "hf")
    model = load(tmp_path / "hf")
    assert model.dtype == torch.float64
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(2, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)
    question, answer = (torch.randint(1, VOCAB, (2, n), generator=generator) for n in (7, 5))
    features = model.vision_model(pixel_values=image).last_hidden_state
    states = model.text_encoder(input_ids=question, encoder_hidden_states=features).last_hidden_state
    out = model.text_decoder(input_ids=answer, encoder_hidden_states=states, labels=answer, reduction="none")
    expected = forward(state, image, question, answer)
    for ours, theirs in zip((features, states, out.logits), expected):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    log_p = expected[2][:, :-1].log_softmax(-1)
    loss = -(0.9 * log_p.gather(-1, answer[:, 1:, None])[..., 0] + 0.1 * log_p.mean(-1)).sum(1)  # label smoothing 0.1, by sample
    torch.testing.assert_close(out.loss, loss, rtol=0, atol=1e-11)


def test_round_trip_official(checkpoint, tmp_path):
    report = convert(checkpoint, tmp_path / "hf")
    assert report.direction == "official -> transformers"
    assert report.n_tensors == len(official_state()) - 4 == len(load_file(tmp_path / "hf/model.safetensors"))
    assert any("epoch" in note for note in report.notes) and any("2 position_ids" in note for note in report.notes)
    back = convert(tmp_path / "hf", tmp_path / "back.pth")
    assert back.direction == "transformers -> official" and back.notes == []
    content = torch.load(tmp_path / "back.pth", weights_only=True)
    assert list(content) == ["model"]
    same(content["model"], official_state())
    assert os.path.getsize(tmp_path / "back.pth") < 1.2 * os.path.getsize(checkpoint)


def test_round_trip_transformers(tmp_path):
    model = BlipForQuestionAnswering(miss_config(tiny=True))
    model.save_pretrained(tmp_path / "a")
    report = convert(tmp_path / "a", tmp_path / "a.pth")
    assert any(note.startswith("text heads: 4") for note in report.notes)
    convert(tmp_path / "a.pth", tmp_path / "b", text_heads=4, vision_heads=4)
    again = load(tmp_path / "b")
    same(again.state_dict(), model.state_dict())
    untold = {"hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate", "initializer_range", "position_range"}
    ours, theirs = facts(again.config), facts(model.config)
    assert {key for _, key in (k for k in ours | theirs if ours.get(k) != theirs.get(k))} <= untold  # the tiny one's own


def test_folder_records_miss(checkpoint, tmp_path):
    convert(checkpoint, tmp_path / "hf")
    config = load(tmp_path / "hf").config
    expected = miss_config(
        image_size=SIZE, patch_size=PATCH, vocab_size=VOCAB, hidden_size=WIDTH, heads=HEADS, vision_layers=DEPTH, text_layers=LAYERS,
        max_position_embeddings=POSITIONS, intermediate_size=2 * WIDTH,
    )  # fmt: skip
    expected.vision_config.intermediate_size = 3 * WIDTH
    assert facts(config) == facts(expected)
    preprocess = json.loads((tmp_path / "hf/fastpeft_preprocess.json").read_text())
    assert preprocess == {"image_size": SIZE, "mean": None, "std": None, "extra_255": True}
    (*_, note) = convert(checkpoint, tmp_path / "blip", preprocess="blip").notes
    assert preprocess_for(tmp_path / "blip", load(tmp_path / "blip")) == Preprocess(SIZE, CLIP_MEAN, CLIP_STD, interpolation="bicubic")
    assert "vocab.txt" in note and "--preprocess blip" in convert(checkpoint, tmp_path / "miss").notes[-1]
    with pytest.raises(ValueError, match="preprocess must be one of miss, blip, not 'clip'"):
        convert(checkpoint, tmp_path / "none", preprocess="clip")


def test_full_size_config_is_miss():
    """Shapes of the published size, without its memory."""
    state = {name: torch.zeros(()).expand(shape) for name, shape in official._shapes(miss_config()).items()}
    back, config = blip_to_transformers(transformers_to_blip(state, miss_config()))
    assert facts(config) == facts(miss_config()) and set(back) == set(state)
    text, vision = config.text_config, config.vision_config
    assert (text.vocab_size, text.bos_token_id, text.sep_token_id, text.eos_token_id, text.pad_token_id) == (30_524, 30_522, 102, 102, 0)
    assert (text.num_attention_heads, text.layer_norm_eps, text.label_smoothing) == (12, 1e-12, 0.1)
    assert (text.hidden_dropout_prob, text.attention_probs_dropout_prob) == (0.1, 0.1)
    assert (vision.num_attention_heads, vision.layer_norm_eps, vision.image_size, vision.drop_path_rate) == (12, 1e-6, 480, 0.1)


def test_build_computes_the_official_loss(tmp_path):
    """fastpeft.build on a converted folder, questions and answers padded, against the official computation of each sample alone."""
    state = official_state(dtype=torch.float64)
    convert(write(tmp_path / "a.pth", state), tmp_path / "hf")
    model = fastpeft.build(tmp_path / "hf", device="cpu", dtype=torch.float64).eval()
    generator = torch.Generator().manual_seed(2)
    image = torch.rand(3, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)
    question, answer = (torch.randint(4, VOCAB, (3, n), generator=generator) for n in (7, 5))
    mask, labels, expected = torch.ones_like(question), answer.clone(), 0.0
    for i, (n, m) in enumerate(((7, 2), (3, 5), (4, 4))):
        question[i, n:], mask[i, n:], labels[i, m:] = 0, 0, -100
        log_p = forward(state, image[i : i + 1], question[i : i + 1, :n], answer[i : i + 1, :m])[2][0, :-1].log_softmax(-1)
        expected = expected - (0.9 * log_p.gather(-1, answer[i, 1:m, None])[..., 0] + 0.1 * log_p.mean(-1)).sum() / 3
    loss = model(pixel_values=image, input_ids=question, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-11)


def test_known_extras_are_left_out():
    state, width = official_state(), WIDTH
    bare = blip_to_transformers(state, None)[0]
    state |= {k.replace("visual_encoder.", "visual_encoder_m."): v for k, v in state.items() if k.startswith("visual_encoder.")}
    state |= {
        "image_queue": torch.zeros(8, 16),
        "queue_ptr": torch.zeros(1),
        "temp": torch.ones([]),
        "itm_head.weight": torch.zeros(2, width),
    }
    state |= {
        "vision_proj.weight": torch.zeros(8, width),
        "text_proj_m.bias": torch.zeros(8),
        "text_encoder.pooler.dense.bias": torch.zeros(width),
    }
    same(blip_to_transformers(state, None)[0], bare)
    notes = " / ".join(official._bare(state)[1])
    for note in ("momentum copies", "2 queues", "3 pretraining heads", "1 poolers", "2 position_ids buffers"):
        assert note in notes


def test_faults_are_all_named():
    state = official_state()
    missing = [f"visual_encoder.blocks.{i}.norm1.{p}" for i in range(DEPTH) for p in ("weight", "bias")]
    missing += [f"text_encoder.encoder.layer.0.attention.self.{r}.{p}" for r in ("query", "key", "value") for p in ("weight", "bias")]
    for name in missing:
        del state[name]
    state["visual_encoder.blocks.0.norm3.weight"] = torch.zeros(3)
    state["text_decoder.cls.predictions.transform.dense.weight"] = torch.zeros(5, 7)
    state["visual_encoder.cls_token"] = torch.zeros(1, 1, 11)  # a tensor sizes are read from: the others still outvote it
    state["visual_encoder.pos_embed"] = torch.zeros(1, 16, WIDTH)
    with pytest.raises(ValueError) as error:
        blip_to_transformers(state)
    text = str(error.value)
    assert "12 missing" in text and "and 2 more" in text and sum(name in text for name in missing) == 10
    assert "1 unexpected: visual_encoder.blocks.0.norm3.weight" in text
    assert "3 misshapen" in text and f"transform.dense.weight (5, 7) instead of ({WIDTH}, {WIDTH})" in text
    assert "visual_encoder.cls_token (1, 1, 11)" in text and "visual_encoder.pos_embed (1, 16, 128) instead of (1, 10, 128)" in text


def test_untied_head_is_refused():
    state = official_state()
    state["text_decoder.cls.predictions.decoder.weight"] = torch.randn(VOCAB, WIDTH)
    with pytest.raises(ValueError, match=r"1 untied: text_decoder\.cls\.predictions\.decoder\.weight"):
        blip_to_transformers(state, None)


def test_one_tied_name_is_enough():
    state = official_state()
    del state["text_decoder.bert.embeddings.word_embeddings.weight"], state["text_decoder.cls.predictions.decoder.bias"]
    same(transformers_to_blip(*blip_to_transformers(state, None)), official_state())


def test_transformers_faults_are_named():
    state, config = blip_to_transformers(official_state(), None)
    del state["vision_model.post_layernorm.bias"]
    state["vision_model.head.weight"] = torch.zeros(2)
    with pytest.raises(ValueError, match=r"1 missing: vision_model\.post_layernorm\.bias; 1 unexpected: vision_model\.head\.weight"):
        transformers_to_blip(state, config)


def test_unequal_widths_and_odd_heads_are_refused():
    with pytest.raises(ValueError, match="give text_heads"):
        blip_to_transformers(official_state(width=48), None)
    config = blip_to_transformers(official_state(width=48), None, text_heads=3, vision_heads=4)[1]
    assert (config.text_config.num_attention_heads, config.vision_config.num_attention_heads) == (3, 4)
    large = {k: v for k, v in official_state(width=192).items() if k.startswith("visual_encoder.")}
    with pytest.raises(ValueError, match="vision width 192 and text width 128 differ"):
        blip_to_transformers(official_state() | large, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", [3, 7])
def test_position_embeddings_are_resized(dtype, grid):
    state = official_state(dtype=dtype)
    converted, config = blip_to_transformers(state, grid * PATCH)
    ours, theirs = converted["vision_model.embeddings.position_embedding"], state["visual_encoder.pos_embed"]
    assert config.vision_config.image_size == grid * PATCH and ours.shape == (1, grid * grid + 1, WIDTH) and ours.dtype == dtype
    assert torch.equal(ours[:, 0], theirs[:, 0])
    # Bicubic with a = -0.75 and half-pixel centres, one axis as a matrix.
    axis = torch.zeros(grid, GRID, dtype=torch.float64)
    for i in range(grid):
        centre = (i + 0.5) * GRID / grid - 0.5
        for j in range(int(centre // 1) - 1, int(centre // 1) + 3):
            t, a = abs(centre - j), -0.75
            weight = ((a + 2) * t - (a + 3)) * t * t + 1 if t <= 1 else a * (((t - 5) * t + 8) * t - 4)
            axis[i, min(max(j, 0), GRID - 1)] += weight
    image = theirs[0, 1:].double().unflatten(0, (GRID, GRID))
    truth = torch.einsum("ai,bj,ijc->abc", axis, axis, image).flatten(0, 1)
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    torch.testing.assert_close(ours[0, 1:].double(), truth, rtol=tolerance, atol=tolerance)
