"""Official files and folders as they come: wrapped, half-precision, sharded, broken, in the way of what is there."""

import json
import os
import struct

import pytest
import torch
from official_miss import (
    HEADS,
    LAYERS,
    SIZE,
    WIDTH,
    load,
    official_again,
    official_state,
    same,
    write,
)
from safetensors.torch import save_file
from transformers import BlipForQuestionAnswering

from fastpeft.convert import writing as writing
from fastpeft.convert.formats import blip_to_transformers, convert


@pytest.fixture
def checkpoint(tmp_path):
    return write(tmp_path / "official.pth", {"model": official_state(), "epoch": 3})


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


@pytest.mark.parametrize("method", ["lora", "ia3", "prefix"])
def test_peft_wrapper_is_stripped(tmp_path, method):
    peft = pytest.importorskip("peft")
    state, config = blip_to_transformers(official_state(), None)
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


def test_broken_files(checkpoint, tmp_path):
    whole = checkpoint.read_bytes()
    for size in (0, 10, 3000, len(whole) // 2, len(whole) - 30):
        (tmp_path / "cut.pth").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut\.pth: no PyTorch checkpoint, or a truncated one"):
            convert(tmp_path / "cut.pth", tmp_path / "hf")
    for content in (b"#" * 100, b"\xff\xd8\xff\xe0", bytes(100)):  # a script, an image, zeros
        (tmp_path / "other.pth").write_bytes(content)
        with pytest.raises(ValueError, match=r"other\.pth: no PyTorch checkpoint, or a truncated one: (?!Weights only)"):
            convert(tmp_path / "other.pth", tmp_path / "hf")
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
    vision = {k: v for k, v in blip_to_transformers(official_state(), None)[0].items() if k.startswith("vision")}
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
        monkeypatch.setattr(writing, "save_tensors", full_disk)
    else:  # where a folder is replaced by two renames, the new one cannot take the name: the old one gets it back
        monkeypatch.setattr("fastpeft.files._exchange", lambda draft, folder: False)
        monkeypatch.setattr("os.replace", lambda a, b: full_disk() if b == out and "-new-" in str(a) else replace(a, b))
    with pytest.raises(OSError, match="No space"):
        convert(checkpoint, out, overwrite=True)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert sorted(os.listdir(tmp_path)) == ["hf", "official.pth"]


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


def test_image_size_in_files(checkpoint, tmp_path):
    report = convert(checkpoint, tmp_path / "hf", image_size=48)
    assert f"position embeddings resized (bicubic) from {SIZE} to 48 pixels" in report.notes
    assert load(tmp_path / "hf").config.vision_config.image_size == 48
    assert json.loads((tmp_path / "hf/fastpeft_preprocess.json").read_text())["image_size"] == 48
    with pytest.raises(ValueError, match="multiple of the patch size, 8"):
        convert(checkpoint, tmp_path / "other", image_size=50)
    with pytest.raises(ValueError, match="config fixes"):
        convert(tmp_path / "hf", tmp_path / "b.pth", image_size=64)
