"""Official MISS/BLIP checkpoints <-> transformers. The official names, and a forward pass on them, are written out independently."""

import functools
import json
import os
import pickle
import struct
import sys
import types
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import BlipConfig, BlipForQuestionAnswering

import fastpeft
from fastpeft.models import convert as module
from fastpeft.models import official
from fastpeft.models.convert import convert, official_to_transformers, transformers_to_official
from fastpeft.models.miss import miss_config

WIDTH, HEADS, DEPTH, LAYERS, VOCAB, PATCH, GRID, POSITIONS = 128, 2, 3, 2, 97, 8, 4, 24
SIZE = PATCH * GRID


def official_state(width=WIDTH, dtype=torch.float32, seed=0):
    return dict(_official_state(width, dtype, seed))


@functools.cache
def _official_state(width, dtype, seed):
    """What the official MISS_VQA's state_dict() holds: every name and shape, random values."""
    generator = torch.Generator().manual_seed(seed)
    state = {}

    def add(name, *shape):
        value = torch.randn(shape, generator=generator) * 0.1
        state[name] = (value + 1 if "norm" in name.lower() and name.endswith("weight") else value).to(dtype)

    def linear(name, n_out, n_in):
        add(f"{name}.weight", n_out, n_in)
        add(f"{name}.bias", n_out)

    def norm(name):
        add(f"{name}.weight", width)
        add(f"{name}.bias", width)

    add("visual_encoder.cls_token", 1, 1, width)
    add("visual_encoder.pos_embed", 1, GRID * GRID + 1, width)
    add("visual_encoder.patch_embed.proj.weight", width, 3, PATCH, PATCH)
    add("visual_encoder.patch_embed.proj.bias", width)
    for i in range(DEPTH):
        block = f"visual_encoder.blocks.{i}"
        norm(f"{block}.norm1")
        linear(f"{block}.attn.qkv", 3 * width, width)
        linear(f"{block}.attn.proj", width, width)
        norm(f"{block}.norm2")
        linear(f"{block}.mlp.fc1", 3 * width, width)
        linear(f"{block}.mlp.fc2", width, 3 * width)
    norm("visual_encoder.norm")
    for bert in ("text_encoder", "text_decoder.bert"):
        state[f"{bert}.embeddings.position_ids"] = torch.arange(POSITIONS).expand(1, -1)
        add(f"{bert}.embeddings.word_embeddings.weight", VOCAB, width)
        add(f"{bert}.embeddings.position_embeddings.weight", POSITIONS, width)
        norm(f"{bert}.embeddings.LayerNorm")
        for i in range(LAYERS):
            layer = f"{bert}.encoder.layer.{i}"
            for attention in ("attention", "crossattention"):
                for role in ("query", "key", "value"):
                    linear(f"{layer}.{attention}.self.{role}", width, width)
                linear(f"{layer}.{attention}.output.dense", width, width)
                norm(f"{layer}.{attention}.output.LayerNorm")
            linear(f"{layer}.intermediate.dense", 2 * width, width)
            linear(f"{layer}.output.dense", width, 2 * width)
            norm(f"{layer}.output.LayerNorm")
    head = "text_decoder.cls.predictions"
    add(f"{head}.bias", VOCAB)
    linear(f"{head}.transform.dense", width, width)
    norm(f"{head}.transform.LayerNorm")
    state[f"{head}.decoder.weight"] = state["text_decoder.bert.embeddings.word_embeddings.weight"]
    state[f"{head}.decoder.bias"] = state[f"{head}.bias"]
    return state


def attend(q, k, v, heads, causal=False):
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def forward(state, image, question, answer, heads=HEADS):
    """The official computation on official names: image features, question states, answer logits."""

    def linear(name, x):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name, x, eps):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def bert(name, ids, memory, causal):
        words, positions = (state[f"{name}.embeddings.{kind}_embeddings.weight"] for kind in ("word", "position"))
        x = norm(f"{name}.embeddings.LayerNorm", words[ids] + positions[: ids.shape[1]], 1e-12)
        for i in range(LAYERS):
            layer = f"{name}.encoder.layer.{i}"
            for kind, keys in (("attention", None), ("crossattention", memory)):
                sub, y = f"{layer}.{kind}", x if keys is None else keys
                mixed = attend(
                    linear(f"{sub}.self.query", x), linear(f"{sub}.self.key", y), linear(f"{sub}.self.value", y), heads,
                    causal and keys is None,
                )  # fmt: skip
                x = norm(f"{sub}.output.LayerNorm", linear(f"{sub}.output.dense", mixed) + x, 1e-12)
            inner = F.gelu(linear(f"{layer}.intermediate.dense", x))
            x = norm(f"{layer}.output.LayerNorm", linear(f"{layer}.output.dense", inner) + x, 1e-12)
        return x

    proj = "visual_encoder.patch_embed.proj"
    x = F.conv2d(image, state[f"{proj}.weight"], state[f"{proj}.bias"], stride=PATCH).flatten(2).mT
    x = torch.cat([state["visual_encoder.cls_token"].expand(len(x), -1, -1), x], 1) + state["visual_encoder.pos_embed"]
    for i in range(DEPTH):
        block = f"visual_encoder.blocks.{i}"
        qkv = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(f"{block}.attn.proj", attend(*qkv, heads))
        x = x + linear(f"{block}.mlp.fc2", F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x, 1e-6))))
    features = norm("visual_encoder.norm", x, 1e-6)
    states = bert("text_encoder", question, features, causal=False)
    head = "text_decoder.cls.predictions"
    y = F.gelu(linear(f"{head}.transform.dense", bert("text_decoder.bert", answer, states, causal=True)))
    return features, states, linear(f"{head}.decoder", norm(f"{head}.transform.LayerNorm", y, 1e-12))


def write(path, content):
    torch.save(content, path)
    return path


def load(folder):
    model, info = BlipForQuestionAnswering.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def official_again(folder):
    return transformers_to_official(load_file(folder / "model.safetensors"), BlipConfig.from_pretrained(folder))


def same(a, b):
    assert set(a) == set(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


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


def facts(config):
    """All fields, but for what saving adds."""
    parts = {"": config, "text": config.text_config, "vision": config.vision_config}
    left_out = ("_name_or_path", "architectures", "dtype", "transformers_version", "text_config", "vision_config")
    return {(part, k): v for part, c in parts.items() for k, v in c.to_dict().items() if k not in left_out}


def test_full_size_config_is_miss():
    """Shapes of the published size, without its memory."""
    state = {name: torch.zeros(()).expand(shape) for name, shape in official._shapes(miss_config()).items()}
    back, config = official_to_transformers(transformers_to_official(state, miss_config()))
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


@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: {"model": s}, lambda s: {"state_dict": s}, lambda s: {f"module.{k}": v for k, v in s.items()}]
)
def test_wrappers(tmp_path, wrap):
    convert(write(tmp_path / "a.pth", wrap(official_state())), tmp_path / "hf")
    same(official_again(tmp_path / "hf"), official_state())


@pytest.mark.parametrize("kind", ["legacy", "safetensors"])
def test_other_file_formats(tmp_path, kind):
    state, path = official_state(), tmp_path / f"a.{kind}"
    if kind == "legacy":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    else:
        save_file({k: v.clone() for k, v in state.items()}, path)
    convert(path, tmp_path / "hf")
    same(official_again(tmp_path / "hf"), state)


def test_sharded_and_bin_folders(checkpoint, tmp_path):
    convert(checkpoint, tmp_path / "hf")
    model = load(tmp_path / "hf")
    model.save_pretrained(tmp_path / "shards", max_shard_size="1MB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    (tmp_path / "bin").mkdir()
    model.config.save_pretrained(tmp_path / "bin")
    write(tmp_path / "bin/pytorch_model.bin", model.state_dict())
    for name in ("shards", "bin"):
        convert(tmp_path / name, tmp_path / f"{name}.pth")
        same(torch.load(tmp_path / f"{name}.pth", weights_only=True)["model"], official_state())


def test_known_extras_are_left_out():
    state, width = official_state(), WIDTH
    bare = official_to_transformers(state, None)[0]
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
    same(official_to_transformers(state, None)[0], bare)
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
        official_to_transformers(state)
    text = str(error.value)
    assert "12 missing" in text and "and 2 more" in text and sum(name in text for name in missing) == 10
    assert "1 unexpected: visual_encoder.blocks.0.norm3.weight" in text
    assert "3 misshapen" in text and f"transform.dense.weight (5, 7) instead of ({WIDTH}, {WIDTH})" in text
    assert "visual_encoder.cls_token (1, 1, 11)" in text and "visual_encoder.pos_embed (1, 16, 128) instead of (1, 10, 128)" in text


def test_untied_head_is_refused():
    state = official_state()
    state["text_decoder.cls.predictions.decoder.weight"] = torch.randn(VOCAB, WIDTH)
    with pytest.raises(ValueError, match=r"1 untied: text_decoder\.cls\.predictions\.decoder\.weight"):
        official_to_transformers(state, None)


def test_one_tied_name_is_enough():
    state = official_state()
    del state["text_decoder.bert.embeddings.word_embeddings.weight"], state["text_decoder.cls.predictions.decoder.bias"]
    same(transformers_to_official(*official_to_transformers(state, None)), official_state())


def test_transformers_faults_are_named():
    state, config = official_to_transformers(official_state(), None)
    del state["vision_model.post_layernorm.bias"]
    state["vision_model.head.weight"] = torch.zeros(2)
    with pytest.raises(ValueError, match=r"1 missing: vision_model\.post_layernorm\.bias; 1 unexpected: vision_model\.head\.weight"):
        transformers_to_official(state, config)


def test_unequal_widths_and_odd_heads_are_refused():
    with pytest.raises(ValueError, match="give text_heads"):
        official_to_transformers(official_state(width=48), None)
    config = official_to_transformers(official_state(width=48), None, text_heads=3, vision_heads=4)[1]
    assert (config.text_config.num_attention_heads, config.vision_config.num_attention_heads) == (3, 4)
    large = {k: v for k, v in official_state(width=192).items() if k.startswith("visual_encoder.")}
    with pytest.raises(ValueError, match="vision width 192 and text width 128 differ"):
        official_to_transformers(official_state() | large, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", [3, 7])
def test_position_embeddings_are_resized(dtype, grid):
    state = official_state(dtype=dtype)
    converted, config = official_to_transformers(state, grid * PATCH)
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


def test_image_size_in_files(checkpoint, tmp_path):
    report = convert(checkpoint, tmp_path / "hf", image_size=48)
    assert f"position embeddings resized (bicubic) from {SIZE} to 48 pixels" in report.notes
    assert load(tmp_path / "hf").config.vision_config.image_size == 48
    assert json.loads((tmp_path / "hf/fastpeft_preprocess.json").read_text())["image_size"] == 48
    with pytest.raises(ValueError, match="multiple of the patch size, 8"):
        convert(checkpoint, tmp_path / "other", image_size=50)
    with pytest.raises(ValueError, match="config fixes"):
        convert(tmp_path / "hf", tmp_path / "b.pth", image_size=64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept(tmp_path, dtype):
    convert(write(tmp_path / "a.pth", official_state(dtype=dtype)), tmp_path / "hf")
    assert load(tmp_path / "hf").dtype == dtype
    convert(tmp_path / "hf", tmp_path / "b.pth")
    same(torch.load(tmp_path / "b.pth", weights_only=True)["model"], official_state(dtype=dtype))


def test_shared_and_strided_tensors(tmp_path):
    """BLIP's pretraining ties the two text towers; some tools save views."""
    state = official_state()
    for name in list(state):
        if name.startswith("text_encoder.") and ".attention." in name:
            state[name.replace("text_encoder.", "text_decoder.bert.")] = state[name]
    fc = "visual_encoder.blocks.0.mlp.fc1.weight"
    state[fc] = state[fc].T.contiguous().T
    convert(write(tmp_path / "a.pth", state), tmp_path / "hf")
    same(official_again(tmp_path / "hf"), state)


@pytest.mark.parametrize("method", ["lora", "ia3", "prefix"])
def test_peft_wrapper_is_stripped(tmp_path, method):
    peft = pytest.importorskip("peft")
    state, config = official_to_transformers(official_state(), None)
    model = BlipForQuestionAnswering(config)
    model.load_state_dict(state)
    sizes = {"num_layers": LAYERS, "token_dim": WIDTH, "num_attention_heads": HEADS, "encoder_hidden_size": WIDTH}
    settings = {
        "lora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["query", "value"]),
        "ia3": lambda: peft.IA3Config(
            task_type="CAUSAL_LM", target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"]
        ),
        "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=True, **sizes),
    }[method]()
    decoder = peft.get_peft_model(model.text_decoder, settings).state_dict()
    wrapped = {k: v for k, v in official_state().items() if not k.startswith("text_decoder.")}
    wrapped |= {f"text_decoder.{k}": v for k, v in decoder.items()}
    report = convert(write(tmp_path / "a.pth", {"model": wrapped}), tmp_path / "hf")
    count = {"lora": LAYERS * 2 * 2 * 2, "ia3": LAYERS * (2 * 2 + 3), "prefix": 6}[method]
    assert f"left out {count} PEFT adapter tensors (only the base weights convert)" in report.notes
    same(official_again(tmp_path / "hf"), official_state())


class Payload:
    def __reduce__(self):
        return (os.system, ("touch ran",))


@pytest.mark.parametrize("legacy", [False, True])
def test_code_is_refused(tmp_path, monkeypatch, legacy):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.pth"
    torch.save({"model": official_state(), "config": Payload()}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"a\.pth: holds posix\.system, not only tensors: refused"):
        convert(path, tmp_path / "hf")
    assert sorted(os.listdir(tmp_path)) == ["a.pth"]


@pytest.fixture
def ruamel(monkeypatch):
    """Classes that pickle as ruamel.yaml 0.19's do, under its names; ``forget`` makes it a package that is not installed."""
    names = {}

    def define(module, name, *bases, **members):
        cls = type(name, bases, {"__module__": f"ruamel.yaml.{module}", "__qualname__": name} | members)
        package = sys.modules.get(cls.__module__) or types.ModuleType(cls.__module__)
        monkeypatch.setitem(sys.modules, cls.__module__, package)
        setattr(package, name, cls)
        names[name] = cls

    for parent in ("ruamel", "ruamel.yaml"):
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    base = type("CommentedBase", (), {})  # without __slots__, so that what derives from it has a __dict__ as well
    define("comments", "CommentedMap", OrderedDict, base, __slots__=("_yaml_comment", "_ok", "_ref"))
    define("comments", "CommentedSeq", list, base, __slots__=("_yaml_comment", "_lst"))
    define("comments", "Comment", __slots__=("comment", "_items", "_post", "_pre"))
    define("comments", "LineCol")
    define("comments", "Format", __slots__=("_flow_style",))
    define("tokens", "CommentToken", __slots__=("start_mark", "_value", "_column"))
    define("error", "FileMark", __slots__=("name", "index", "line", "column"))
    define("scalarfloat", "ScalarFloat", float)
    define("scalarint", "ScalarInt", int)
    define("scalarstring", "SingleQuotedScalarString", str, __slots__=("lc",))
    names["forget"] = lambda: [monkeypatch.delitem(sys.modules, n) for n in list(sys.modules) if n.split(".")[0] == "ruamel"]
    return types.SimpleNamespace(**names)


@pytest.fixture
def yaml_config(ruamel):
    """What ruamel.yaml makes of MISS's configs: a mapping of scalars, each with its place and layout, and comments."""

    def made(value, **state):
        for key, item in state.items():
            setattr(value, key, item)
        return value

    mark = made(ruamel.FileMark(), name="configs/rad.yaml", index=0, line=0, column=0)
    token = made(ruamel.CommentToken(), start_mark=mark, _value="# set pretrained as a file path or an url\n", _column=0)
    config = ruamel.CommentedMap(
        pretrained=ruamel.SingleQuotedScalarString("Your path"), vit="base", vit_grad_ckpt=False, image_size=480,
        init_lr=made(ruamel.ScalarFloat(2e-5), _width=1, _prec=-1, _m_sign=False, _exp="e", _underscore=None),
        min_lr=made(ruamel.ScalarInt(0), _width=1, _underscore=None),
    )  # fmt: skip
    comment = made(ruamel.Comment(), comment=[None, [token]], _items={"vit": [None, None, token, None]})
    places = made(ruamel.LineCol(), line=2, col=0, data={"vit": [5, 0, 5, 5]})
    return made(config, _yaml_comment=comment, _yaml_line_col=places, _yaml_format=made(ruamel.Format(), _flow_style=False), _ok=set())


def test_official_yaml_config_beside_model(tmp_path, ruamel, yaml_config):
    """MISS and MILE save their ruamel.yaml config in the checkpoint; it is skipped, with or without ruamel.yaml installed."""
    path = write(tmp_path / "a.pth", {"model": official_state(), "config": yaml_config, "epoch": 1})
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    before = set(torch.serialization.get_safe_globals())
    convert(path, tmp_path / "installed")
    ruamel.forget()
    assert "left out what lies beside 'model': config, epoch" in convert(path, tmp_path / "hf").notes
    same(official_again(tmp_path / "hf"), official_state())
    assert set(torch.serialization.get_safe_globals()) == before


def test_yaml_list_is_refused_with_a_remedy(tmp_path, ruamel, yaml_config):
    """weights_only appends to nothing but plain lists; an empty one of ruamel.yaml's loads."""
    yaml_config["train_files"] = ruamel.CommentedSeq()
    yaml_config["train_files"].line = 3
    convert(write(tmp_path / "a.pth", {"model": official_state(), "config": yaml_config}), tmp_path / "hf")
    yaml_config["train_files"].extend(["vqa_train", "vqa_val"])
    write(tmp_path / "a.pth", {"model": official_state(), "config": yaml_config})
    with pytest.raises(ValueError, match=r"config holds a list.*torch\.load\('a\.pth', weights_only=False\)\['model'\]"):
        convert(tmp_path / "a.pth", tmp_path / "b")


def test_yaml_config_opens_no_door(tmp_path, monkeypatch, yaml_config):
    monkeypatch.chdir(tmp_path)
    yaml_config["hidden"], yaml_config["other"] = Payload(), types.SimpleNamespace(x=1)
    path = write(tmp_path / "a.pth", {"model": official_state(), "config": yaml_config})
    with pytest.raises(ValueError, match=r"holds posix\.system, types\.SimpleNamespace, not only tensors: refused"):
        convert(path, tmp_path / "hf")
    assert sorted(os.listdir(tmp_path)) == ["a.pth"]


class Disguised:
    """A call of os.system that hides in arguments of ruamel.yaml's names, which nobody calls."""

    def __reduce__(self):
        return (sys.modules["ruamel.yaml.comments"].LineCol, (Payload(),))


def test_yaml_names_call_nothing(tmp_path, monkeypatch, ruamel):
    """Even with every refusal by name taken away, torch itself blocks os, and a stand-in runs nothing."""
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "a.pth", {"model": official_state(), "config": Disguised()})
    monkeypatch.setattr(module, "get_unsafe_globals_in_checkpoint", lambda path: ["ruamel.yaml.comments.LineCol"])
    with pytest.raises(ValueError, match=r"holds posix\.system, not only tensors: refused"):
        convert(path, tmp_path / "hf")
    assert sorted(os.listdir(tmp_path)) == ["a.pth"]


def test_broken_files(checkpoint, tmp_path):
    whole = checkpoint.read_bytes()
    for size in (0, 10, 3000, len(whole) // 2, len(whole) - 30):
        (tmp_path / "cut.pth").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut\.pth: no PyTorch checkpoint, or a truncated one"):
            convert(tmp_path / "cut.pth", tmp_path / "hf")
    for content in (whole[:100], struct.pack("<Q", 1 << 40)):
        (tmp_path / "cut.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="no safetensors file, or a truncated one"):
            convert(tmp_path / "cut.safetensors", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_wrong_sources(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        convert(tmp_path / "nowhere.pth", tmp_path / "hf")
    with pytest.raises(ValueError, match=r"no MISS or BLIP VQA checkpoint: no visual_encoder\.\*.* but fc$"):
        convert(write(tmp_path / "a.pth", {"fc.weight": torch.zeros(2)}), tmp_path / "hf")
    with pytest.raises(ValueError, match="holds a list"):
        convert(write(tmp_path / "a.pth", [1]), tmp_path / "hf")
    vision = {k: v for k, v in official_to_transformers(official_state(), None)[0].items() if k.startswith("vision")}
    with pytest.raises(ValueError, match="transformers' names: give the folder"):
        convert(write(tmp_path / "a.pth", vision), tmp_path / "hf")
    folder = tmp_path / "folder"
    folder.mkdir()
    for text in (None, "{", '{"model_type": "bert"}', "[]", '{"model_type": "blip", "text_config": {"hidden_size": "x"}}'):
        if text is not None:
            (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match="no transformers folder to convert"):
            convert(folder, tmp_path / "b.pth")
    (folder / "config.json").write_text('{"model_type": "blip"}')
    with pytest.raises(ValueError, match="no safetensors file"):
        convert(folder, tmp_path / "b.pth")


def test_out_is_not_overwritten_unasked(checkpoint, tmp_path):
    out = tmp_path / "deep" / "hf"
    out.mkdir(parents=True)
    convert(checkpoint, out)  # an empty folder is free
    (out / "vocab.txt").write_text("mine")
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="exists and is not empty"):
        convert(checkpoint, out)
    write(checkpoint, official_state(seed=5))
    convert(checkpoint, out, overwrite=True)
    assert (out / "model.safetensors").read_bytes() != before and (out / "vocab.txt").read_text() == "mine"
    convert(out, tmp_path / "b.pth")
    with pytest.raises(ValueError, match=r"b\.pth exists"):
        convert(out, tmp_path / "b.pth")
    convert(out, tmp_path / "b.pth", overwrite=True)
    with pytest.raises(ValueError, match="is a folder"):
        convert(out, tmp_path, overwrite=True)
    with pytest.raises(ValueError, match="is a file"):
        convert(checkpoint, tmp_path / "b.pth", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["b.pth", "deep", "official.pth"] and os.listdir(tmp_path / "deep") == ["hf"]


@pytest.mark.parametrize("fault", ["save_file", "replace"])
def test_failure_leaves_what_was_there(checkpoint, tmp_path, monkeypatch, fault):
    out = tmp_path / "hf"
    convert(checkpoint, out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    replace = os.replace
    if fault == "save_file":
        monkeypatch.setattr(module, "save_file", full_disk)
    else:  # the new folder cannot take the name: the old one gets it back
        monkeypatch.setattr(
            module.os, "replace", lambda a, b: replace(a, b) if str(a).endswith("hf") or ".before" in str(a) else full_disk()
        )
    with pytest.raises(OSError, match="No space"):
        convert(checkpoint, out, overwrite=True)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert sorted(os.listdir(tmp_path)) == ["hf", "official.pth"]
