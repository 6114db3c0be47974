"""OpenAI's CLIP to transformers: the official computation, files as published (TorchScript), every fault named."""

import json
import os
import pickle
import zipfile

import pytest
import torch
from official_clip import clip_forward, clip_state
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPVisionModelWithProjection

from fastpeft.convert import clip_names as module
from fastpeft.convert.formats import convert

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


def write(path, content):
    torch.save(content, path)
    return path


def load(folder, dtype=torch.float64):
    model, info = CLIPVisionModelWithProjection.from_pretrained(folder, output_loading_info=True, dtype=dtype)
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize("size", [{}, {"width": 192, "layers": 2, "patch": 4, "grid": 3, "out": 7}, {"width": 64, "grid": 1, "layers": 12}])
def test_features_are_the_official_ones(tmp_path, size):
    state = clip_state(**size)
    report = convert(write(tmp_path / "a.pt", state), tmp_path / "hf")
    assert report.direction == "CLIP -> transformers" and report.notes == ["left out 9 tensors of the text encoder"]
    model, side = load(tmp_path / "hf"), size.get("grid", 4) * size.get("patch", 8)
    assert model.config.image_size == side and model.config.num_attention_heads == size.get("width", 128) // 64
    image = torch.rand(1, 3, side, side, dtype=torch.float64)
    torch.testing.assert_close(model(pixel_values=image).image_embeds, clip_forward(state, image)[0], rtol=1e-10, atol=1e-10)
    assert report.n_tensors == len(load_file(tmp_path / "hf/model.safetensors"))
    preprocess = json.loads((tmp_path / "hf/preprocessor_config.json").read_text())
    assert preprocess["size"] == {"shortest_edge": side} and preprocess["image_mean"][0] == 0.48145466 and preprocess["resample"] == 3


def nested(state):
    """A module whose state dict this is."""
    root = nn.Module()
    for name, tensor in state.items():
        *path, leaf = name.split(".")
        owner = root
        for piece in path:
            if not hasattr(owner, piece):
                owner.add_module(piece, nn.Module())
            owner = getattr(owner, piece)
        if tensor.is_floating_point():
            owner.register_parameter(leaf, nn.Parameter(tensor))
        else:
            owner.register_buffer(leaf, tensor)
    return root


def published():
    """As OpenAI's: what convolutions, linear layers and projections hold is float16, the rest float32."""
    half = ("conv1", "attn", "mlp", "proj")
    return {n: t.half() if any(p in n for p in half) and n.startswith("visual") else t.float() for n, t in clip_state().items()}


def test_torchscript_is_read_as_its_state_dict(tmp_path):
    state = {n: t for n, t in published().items() if t.is_floating_point()} | {"input_resolution": torch.tensor(32)}
    scripted = torch.jit.script(nested(state))
    torch.jit.save(scripted, tmp_path / "ViT.pt")
    reports = convert(tmp_path / "ViT.pt", tmp_path / "a"), convert(write(tmp_path / "plain.pt", state), tmp_path / "b")
    assert reports[0] == reports[1]
    ours, plain = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert ours.keys() == plain.keys() and all(torch.equal(ours[n], t) and ours[n].dtype == t.dtype for n, t in plain.items())
    assert {t.dtype for t in ours.values()} == {torch.float16, torch.float32}
    assert ours["vision_model.encoder.layers.1.self_attn.k_proj.weight"].dtype == torch.float16
    assert load(tmp_path / "a", dtype="auto").dtype == torch.float32  # so that no norm is rounded unasked


class Trap(nn.Module):
    """Loading this in TorchScript runs code of the archive's."""

    def __init__(self):
        super().__init__()
        self.visual = nested({"conv1.weight": torch.zeros(64, 3, 4, 4)})
        self.training = False

    @torch.jit.export
    def __getstate__(self):
        return (torch.zeros(1), self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]):
        assert state[0].sum() > 1, "the archive's code ran"
        self.training = state[1]

    def forward(self, x):
        return x


def test_an_archives_code_does_not_run(tmp_path):
    torch.jit.save(torch.jit.script(Trap()), tmp_path / "a.pt")
    with pytest.raises(torch.jit.Error, match="the archive's code ran"):
        torch.jit.load(tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt: no MISS or BLIP VQA checkpoint: .* but nothing"):
        convert(tmp_path / "a.pt", tmp_path / "hf")


class Payload:
    def __reduce__(self):
        return (os.system, ("touch ran",))


def test_an_archives_pickle_calls_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.jit.save(torch.jit.script(nested({"visual.proj": torch.zeros(2)})), "whole.pt")
    with zipfile.ZipFile("whole.pt") as archive, zipfile.ZipFile("a.pt", "w") as changed:
        for name in archive.namelist():
            changed.writestr(name, pickle.dumps(Payload(), 2) if name.endswith("/data.pkl") else archive.read(name))
    with pytest.raises(ValueError, match=r"a\.pt: holds posix\.system, not only tensors: refused"):
        convert("a.pt", "hf")
    assert sorted(os.listdir()) == ["a.pt", "whole.pt"]


def test_truncated_archives(tmp_path):
    torch.jit.save(torch.jit.script(nested(published())), tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    for size in (100, len(whole) // 2, len(whole) - 40):
        (tmp_path / "cut.pt").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut\.pt: no .*, or a truncated one"):
            convert(tmp_path / "cut.pt", tmp_path / "hf")
    at = len(whole) // 2
    (tmp_path / "cut.pt").write_bytes(whole[:at] + bytes(64) + whole[at + 64 :])  # checksums tell
    with pytest.raises(ValueError, match=r"cut\.pt: no .*, or a truncated one"):
        convert(tmp_path / "cut.pt", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_faults_are_all_named():
    state = clip_state()
    del state["visual.transformer.resblocks.2.ln_1.bias"], state["visual.ln_post.weight"]
    state["visual.transformer.resblocks.0.attn.gate"] = torch.ones(1)
    state["visual.transformer.resblocks.1.attn.in_proj_weight"] = torch.ones(3, 128)
    state["visual.class_embedding"] = torch.ones(5)
    with pytest.raises(ValueError) as error:
        module.clip_to_transformers(state)
    for text in (
        "2 missing: visual.ln_post.weight, visual.transformer.resblocks.2.ln_1.bias",
        "1 unexpected: visual.transformer.resblocks.0.attn.gate",
        "2 misshapen: visual.class_embedding (5,) instead of (128,)",
        "visual.transformer.resblocks.1.attn.in_proj_weight (3, 128) instead of (384, 128)",
    ):
        assert text in str(error.value)


def test_what_cannot_be(tmp_path):
    clip = write(tmp_path / "a.pt", clip_state(width=96))
    with pytest.raises(ValueError, match="width 96 is not made of heads of 64: give vision_heads"):
        convert(clip, tmp_path / "hf")
    assert convert(clip, tmp_path / "hf", vision_heads=4).n_tensors and load(tmp_path / "hf").config.num_attention_heads == 4
    with pytest.raises(ValueError, match=r"image_size is no option of OpenAI's CLIP: it takes vision_heads"):
        convert(clip, tmp_path / "b", image_size=64)
    with pytest.raises(ValueError, match=r"llama .* and backbone .* go together"):
        convert(clip, tmp_path / "b", vision_heads=4, backbone="lavin")
    with pytest.raises(ValueError, match=r"nowhere: no such folder: give LLaMA's"):
        convert(clip, tmp_path / "b", vision_heads=4, backbone="lavin", llama=tmp_path / "nowhere")
    for name in ("visual.layer1.0.conv1.weight", "visual.other.weight"):
        with pytest.raises(ValueError, match=r"encoder is a ResNet|no visual\.transformer\.resblocks\.\* tensors, but visual"):
            convert(write(tmp_path / "b.pt", {name: torch.zeros(2)}), tmp_path / "b")
    assert not (tmp_path / "b").exists()
