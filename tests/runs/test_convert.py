"""LaVIN's published files to a folder: the official computation on their own names, and what cannot be."""

import json
import shutil

import pytest
import torch
from official_lavin import (
    DIM,
    SCALE,
    TEMPERATURE,
    VOCAB,
    adapter_state,
    arguments,
    clip,
    embedded,
    forward,
    image_tokens,
    llama_state,
    write_adapter,
    write_all,
    write_llama_folder,
)
from transformers import LlamaForCausalLM

import fastpeft as fp
from fastpeft.adapters import describe
from fastpeft.convert import writing as writing
from fastpeft.convert.formats import convert
from fastpeft.convert.lavin_names import lavin_to_fastpeft
from fastpeft.models.clip import vision_config
from fastpeft.models.llama import llama_config
from fastpeft.runs.convert import convert_run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("official"))


@pytest.fixture(scope="module")
def complete(official):
    out = official / "lavin"
    report = convert_run(official / "lavin.pth", out, llama=official / "7B", clip=official / "ViT.pt")
    return out, report


def load(folder):
    return fp.load_adapter(fp.build(folder, dtype=torch.float64), folder / "adapter").eval()


def sample(seed, image):
    """(ids before the image's tokens, ids after, the last so many answered, image): [bos, "Image: "] and so on."""
    draw = torch.Generator().manual_seed(seed)
    before, after = (torch.randint(3, VOCAB, (n,), generator=draw) for n in (4, 9 + seed))
    return before, after, 4, torch.randn(1, 3, 32, 32, dtype=torch.float64, generator=draw) if image else None


def ours(before, after, answered, image):
    places = torch.cat([torch.zeros(len(before)), torch.ones(0 if image is None else 2), torch.zeros(len(after))]).bool()
    ids = torch.zeros(len(places), dtype=torch.long)
    ids[~places] = torch.cat([before, after])
    batch = {"input_ids": ids[None], "image_mask": places[None]}
    batch |= {} if image is None else {"pixel_values": image, "image_index": torch.tensor([0])}
    return batch, torch.where(torch.arange(len(ids)) >= len(ids) - answered, ids, -100)[None]


def agrees(model, llama=None):
    """Logits, the loss and the image's tokens of samples with and without an image."""
    llama, seen, adapters = llama or llama_state(), clip(), adapter_state()
    for seed in range(4):
        before, after, answered, image = sample(seed, image=seed % 2 == 0)
        truth = forward(llama, adapters, embedded(llama, seen, adapters, before, after, image), int(image is not None))[1:]
        batch, labels = ours(before, after, answered, image)
        # rotary angles are float32 in transformers
        torch.testing.assert_close(model(**batch).logits[0], truth, rtol=1e-4, atol=1e-5)
        loss = torch.nn.functional.cross_entropy(truth[-answered - 1 : -1], after[-answered:])
        torch.testing.assert_close(model(**batch, labels=labels).loss, loss, rtol=1e-5, atol=0)
        if image is not None:
            torch.testing.assert_close(model.encode_images(image), image_tokens(seen, adapters, image), rtol=1e-9, atol=1e-9)


def test_the_official_computation(complete):
    folder, report = complete
    model = load(folder)
    agrees(model)
    assert str(model.fastpeft_plan) == "MMAdapter/T/MMAdapter" and report.direction == "LaVIN + CLIP + LLaMA -> lavin"
    assert fp.count(model)["trainable"] == sum(t.numel() for t in adapter_state().values())
    method = model.fastpeft_plan.treatments["llm"][0]
    assert (method.scale, method.temperature, method.h, method.groups, method.dropout) == (SCALE, TEMPERATURE, 8, 2, 0.1)
    assert "left out what lies beside 'model': epoch, optimizer, scaler" in report.notes
    assert f"adapters of scale 0.7, routed at temperature 3, in {folder / 'adapter'}" in report.notes
    about = describe(folder / "adapter")
    assert about["base"] == {"model": str(folder), "dtype": "float64"} and about["base_fingerprint"]
    assert report.n_tensors == len(model.state_dict())


@pytest.mark.parametrize("form", ["two shards", "transformers", "small shards"])
def test_other_forms_of_llama(official, complete, tmp_path, form, monkeypatch):
    llama = official / ("13B" if form == "two shards" else "7B")
    if form == "transformers":
        convert(llama, tmp_path / "hf")
        LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float64).save_pretrained(tmp_path / "llama", max_shard_size="1MB")
        llama = tmp_path / "llama"
        assert len(list(llama.glob("*.safetensors"))) > 1
    if form == "small shards":
        monkeypatch.setattr(writing, "SHARD_BYTES", 1 << 20)
    convert_run(official / "lavin.pth", tmp_path / "out", llama=llama, clip=official / "ViT.pt")
    again, first = load(tmp_path / "out").state_dict(), load(complete[0]).state_dict()
    assert again.keys() == first.keys() and all(torch.equal(again[n], t) for n, t in first.items())
    assert describe(tmp_path / "out/adapter")["base_fingerprint"] == describe(complete[0] / "adapter")["base_fingerprint"]
    assert (len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 1) == (form == "small shards")


def test_the_fingerprint_is_the_models(complete, tmp_path, recwarn):
    load(complete[0])
    assert not [w for w in recwarn if "other base weights" in str(w.message)]
    other = tmp_path / "other"
    shutil.copytree(complete[0], other)
    base = fp.build(other, dtype=torch.float64)
    base.llm.model.embed_tokens.weight.data += 1
    with pytest.warns(UserWarning, match="other base weights"):
        fp.load_adapter(base, other / "adapter")


def test_float16_stays_and_adapters_stay_float32(official, tmp_path):
    """As published: the bases in float16, what was trained in float32."""
    write_llama_folder(tmp_path / "7B", {n: t.half() for n, t in llama_state().items()})
    torch.save({n: t.half() for n, t in clip().items()}, tmp_path / "ViT.pt")
    write_adapter(tmp_path / "lavin.pth", {n: t.float() for n, t in adapter_state().items()})
    convert_run(tmp_path / "lavin.pth", tmp_path / "out", llama=tmp_path / "7B", clip=tmp_path / "ViT.pt")
    model = fp.load_adapter(fp.build(tmp_path / "out", dtype=torch.float16), tmp_path / "out/adapter")
    dtypes = {("mm_adapter" in n.split("."), p.dtype) for n, p in model.named_parameters()}
    assert dtypes == {(False, torch.float16), (True, torch.float32)}
    about = json.loads((tmp_path / "out/config.json").read_text()), describe(tmp_path / "out/adapter")["base"]
    assert about[0]["dtype"] == about[1]["dtype"] == "float16"
    assert torch.equal(model.llm.model.layers[2].mm_adapter.w_up[1], adapter_state()["layers.2.adapter_attn.conv_D.weight"][..., 0].float())


@pytest.mark.parametrize("prefix", ["", "module."])
def test_what_the_files_arguments_say(official, tmp_path, prefix):
    how = {"llama": official / "7B", "clip": official / "ViT.pt"}
    write_adapter(tmp_path / "a.pth", adapter_state(), prefix=prefix)
    convert_run(tmp_path / "a.pth", tmp_path / "given", **how, temperature=2.5, adapter_scale=-1)
    bare = torch.load(tmp_path / "a.pth", weights_only=False)
    torch.save({"model": bare["model"]}, tmp_path / "bare.pth")
    report = convert_run(tmp_path / "bare.pth", tmp_path / "bare", **how)
    assert "the file does not say adapter_scale 1, temperature 10: taken from the published runs" in report.notes
    for name, scale, temperature in (("given", -1.0, 2.5), ("bare", 1.0, 10.0)):
        for part in ("vision", "llm"):
            method = load(tmp_path / name).fastpeft_plan.treatments[part][0]
            assert (method.scale, method.temperature) == (scale, temperature)


def test_another_bottleneck(official, tmp_path):
    write_adapter(tmp_path / "a.pth", adapter_state(h=12, groups=4))
    convert_run(tmp_path / "a.pth", tmp_path / "out", llama=official / "7B", clip=official / "ViT.pt")
    method = load(tmp_path / "out").fastpeft_plan.treatments["vision"][0]
    assert (method.h, method.groups) == (12, 4)


def test_vicuna_is_llama_and_a_delta_in_another_order_of_rows(official, tmp_path):
    """The official code adds transformers' rows of q and k to the original's; the adapters were trained on that."""
    names = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head", "attention_norm": "input_layernorm"}
    names |= {f"w{c}": f"self_attn.{c}_proj" for c in "qkvo"} | {"w1": "mlp.gate_proj", "w2": "mlp.down_proj", "w3": "mlp.up_proj"}
    names |= {"ffn_norm": "post_attention_layernorm"}
    torch.manual_seed(5)
    delta, both = {}, {}
    for name, tensor in llama_state().items():
        layer = f"model.{'.'.join(name.split('.')[:2])}." if name.startswith("layers.") else ""
        delta[f"{layer}{names[name.split('.')[-2]]}.weight"] = more = torch.randn_like(tensor) / 20
        both[name] = tensor + more
    (tmp_path / "delta").mkdir()
    torch.save(delta, tmp_path / "delta/pytorch_model.bin")
    write_adapter(tmp_path / "a.pth", adapter_state(), arguments(use_vicuna=True))
    how = {"llama": official / "7B", "clip": official / "ViT.pt"}
    with pytest.raises(ValueError, match="trained on Vicuna"):
        convert_run(tmp_path / "a.pth", tmp_path / "out", **how)
    with pytest.raises(ValueError, match="not trained on Vicuna"):
        convert_run(official / "lavin.pth", tmp_path / "out", **how, vicuna_delta=tmp_path / "delta")
    convert_run(tmp_path / "a.pth", tmp_path / "out", **how, vicuna_delta=tmp_path / "delta")
    agrees(load(tmp_path / "out"), both)
    torch.save(delta | {"model.embed_tokens.weight": torch.zeros(301, DIM)}, tmp_path / "delta/pytorch_model.bin")
    with pytest.raises(ValueError, match=r"delta's model\.embed_tokens\.weight is \(301, 256\), not \(300, 256\)"):
        convert_run(tmp_path / "a.pth", tmp_path / "b", **how, vicuna_delta=tmp_path / "delta")


@pytest.mark.parametrize("backbone", ["excitor", "lavin"])
def test_backbones_without_adapters(official, tmp_path, backbone):
    report = convert_run(official / "ViT.pt", tmp_path / "out", llama=official / "13B", backbone=backbone)
    model = fp.build(tmp_path / "out", dtype=torch.float64)
    convert(official / "7B", tmp_path / "llama")
    llama, (before, after, _, image) = fp.build(tmp_path / "llama", dtype=torch.float64), sample(0, image=True)
    ids = torch.cat([before, after])[None]
    assert report.direction == f"CLIP + LLaMA -> {backbone}" and ("the neck is new" in " ".join(report.notes)) == (backbone == "lavin")
    torch.testing.assert_close(model(input_ids=ids).logits, llama(input_ids=ids).logits)
    assert fp.adapt(model, "MMAdapter/T/MMAdapter" if backbone == "lavin" else "F/Excitor").encode_images(image).isfinite().all()


@pytest.mark.parametrize("size, count, temperature", [("7b", 3_781_296, 10.0), ("13b", 5_390_080, 5.0)])
def test_published_sizes(size, count, temperature):
    """Shapes of the published files, without their memory: the papers' counts, and the router's temperature of their scripts."""
    text, vision = llama_config(f"llama-{size}"), vision_config("L/14")
    blocks = {"layers": (text.num_hidden_layers, text.hidden_size), "backbone.visual.transformer.resblocks": (24, 1024)}
    shapes = {"adapter_proj.conv_A.weight": (128, 1024), "adapter_proj.conv_A.bias": (128,)}
    shapes |= {"adapter_proj.conv_B.weight": (text.hidden_size, 128), "adapter_proj.conv_B.bias": (text.hidden_size,)}
    shapes |= {"adapter_modality_embedding.weight": (2, text.hidden_size)}
    for name, (layers, width) in blocks.items():
        one = {"conv_A.weight": (8, width, 1), "conv_A.bias": (8,), "expert_weights.weight": (2, width), "expert_weights.bias": (2,)}
        one |= {"conv_B.weight": (width, 4, 1), "conv_D.weight": (width, 4, 1), "conv_B.bias": (width,), "conv_D.bias": (width,)}
        shapes |= {f"{name}.{i}.adapter_attn.{leaf}": shape for i in range(layers) for leaf, shape in one.items()}
    state = {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}
    lavin = lavin_to_fastpeft(state, {}, vision, text)
    held = [*lavin.base.values(), *(t for part in lavin.adapters.values() for t in part.values())]
    assert sum(t.numel() for t in held) == count and lavin.methods["llm"].temperature == temperature and lavin.config.visual_tokens == 6
    assert lavin.methods["vision"] == fp.MMAdapter(temperature=temperature)
