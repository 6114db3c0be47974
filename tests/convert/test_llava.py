"""LLaVA-Med's published folders: logits equal to the authors' computation on their own names, and what cannot be."""

import json

import pytest
import torch
from official_llava import (
    BASE,
    DIM,
    MED,
    PATCHES,
    TOKENS,
    V1_5,
    WIDTH,
    clip,
    config_of,
    first_release,
    forward,
    projector_state,
    release_1_5,
    text_state,
    write_folder,
)

import fastpeft as fp
from fastpeft.convert.formats import convert
from fastpeft.data import CausalDataset, Instruction, Preprocess, load_causal_tokenizer
from fastpeft.data.prompts import IMAGE, render
from fastpeft.runs import causal
from fastpeft.runs.options import TextOptions

pytestmark = pytest.mark.usefixtures("one_thread")
QUESTION = "hello, tell the hot hello?"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A LLaMA, CLIP as OpenAI's file and as transformers' folder, the first release's delta, v1.5 whole."""
    root = tmp_path_factory.mktemp("official")
    write_folder(root / "llama", config_of(model_type="llama", architectures=["LlamaForCausalLM"]), text_state(), shards=1)
    torch.save(clip(), root / "ViT.pt")
    convert(root / "ViT.pt", root / "clip")
    delta = text_state(BASE + 4, seed=1, scale=0.05) | projector_state()
    write_folder(root / "delta", config_of(**MED), delta, tokens=TOKENS)
    whole = text_state(BASE, groups=2, seed=2) | projector_state(2)
    write_folder(root / "v1.5", config_of(2, 1e6, **V1_5 | {"mm_vision_tower": str(root / "clip")}), whole)
    return root


@pytest.fixture(scope="module")
def med(root):
    report = convert(root / "delta", root / "med", llama=root / "llama", clip=root / "ViT.pt")
    return root / "med", report


@pytest.fixture(scope="module")
def v1_5(root):
    report = convert(root / "v1.5", root / "med1.5")
    return root / "med1.5", report


def first_weights():
    """The delta and LLaMA's, as apply_delta.py adds them: to the first rows where the vocabulary has grown."""
    base, delta = text_state(), text_state(BASE + 4, seed=1, scale=0.05)
    for name, tensor in delta.items():
        tensor[: len(base[name])] += base[name]
    return delta | projector_state()


def read(folder, question, image, tmp_path, **how):
    """(model, tokenizer, the batch that the model gets of a question), by the folder alone."""
    network, tokenizer = fp.build(folder, dtype=torch.float64), load_causal_tokenizer(folder)
    path = tmp_path / "x.png"
    sample = Instruction(((question, ""),), path if image is not None else None, "vqa", "0", 0, path, **how.pop("sample", {}))
    asked = causal.dataset(network, [sample], tokenizer, None, TextOptions(max_length=900, **how), prompts_only=True)
    batch = asked.collator()([asked[0]])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "image_mask")}
    if image is not None:
        inputs |= {"pixel_values": image, "image_index": torch.tensor([0])}
    return network, tokenizer, inputs


def picture(seed):
    return torch.randn(1, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to "
    "the human's questions."
)
SIMPLE = f"{SYSTEM}###Human: Hi!###Assistant: Hi there!  How can I help you today?\n###Human: {{}}###Assistant:"
PLACES = "<im_start>" + "<im_patch>" * PATCHES + "<im_end>"


@pytest.mark.parametrize(
    ("how", "asked"),
    [
        ({}, f"{QUESTION}\n{PLACES}"),
        ({"image_place": "before"}, f"{PLACES}\n{QUESTION}"),
        ({"image_place": "data", "sample": {"image_at": 7}}, f"{QUESTION[:7]}{PLACES}{QUESTION[7:]}"),
        (None, QUESTION),
    ],
    ids=["after", "before", "within", "without"],
)
def test_first_release(med, how, asked, tmp_path):
    """delta + LLaMA + CLIP: the prompt of model_vqa_med.py, then llava.py's forward."""
    image = None if how is None else picture(3)
    network, tokenizer, inputs = read(med[0], QUESTION, image, tmp_path, **how or {})
    ids = torch.tensor([1, *tokenizer(SIMPLE.format(asked), add_special_tokens=False)["input_ids"]])
    start, end, patch = (tokenizer.convert_tokens_to_ids(token) for token in ("<im_start>", "<im_end>", "<im_patch>"))
    assert [patch, start, end] == [BASE + 1, BASE + 2, BASE + 3] == [network.config.image_token_index, BASE + 2, BASE + 3]
    mine = torch.where(inputs["image_mask"][0], patch, inputs["input_ids"][0])
    assert torch.equal(mine, ids)
    weights = first_weights()
    truth = forward(weights, first_release(weights, ids, image, start, end))
    torch.testing.assert_close(network(**inputs).logits[0], truth, rtol=1e-4, atol=1e-5)  # transformers' rotary angles are float32
    if image is not None:  # ids with <im_patch> in them, as the official code takes them
        torch.testing.assert_close(network(input_ids=ids[None], pixel_values=image).logits[0], truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("image", [True, False])
def test_v1_5(v1_5, image, tmp_path):
    """Mistral, mlp2x_gelu, the image encoder at the path that config.json names."""
    image = picture(4) if image else None
    network, tokenizer, inputs = read(v1_5[0], QUESTION, image, tmp_path)
    chunks = (f"[INST] <image>\n{QUESTION} [/INST]" if image is not None else f"[INST] {QUESTION} [/INST]").split("<image>")
    chunks = [torch.tensor([1] * (not i) + tokenizer(text, add_special_tokens=False)["input_ids"]) for i, text in enumerate(chunks)]
    weights = text_state(BASE, groups=2, seed=2) | projector_state(2)
    truth = forward(weights, release_1_5(weights, chunks, image), theta=1e6)
    torch.testing.assert_close(network(**inputs).logits[0], truth, rtol=1e-4, atol=1e-5)
    config = network.config
    assert (config.image_aspect_ratio, config.prompt_template, config.image_token_index) == ("pad", "mistral_instruct", -200)
    assert type(network.model.language_model).__name__ == "LlamaModel" and len(tokenizer) == BASE


def test_reports(med, v1_5, root):
    assert med[1].n_tensors == v1_5[1].n_tensors - 2 and any("a delta" in note for note in med[1].notes)
    assert any("whole weights" in note for note in v1_5[1].notes) and any(str(root / "clip") in note for note in v1_5[1].notes)
    assert json.loads((med[0] / "preprocessor_config.json").read_text())["crop_size"] == {"height": 32, "width": 32}


def test_the_checkpoints_own_image_encoder(root, tmp_path):
    """v1.5 holds it as model.vision_tower.vision_tower.vision_model.*; what is given goes before it."""
    other = {name: tensor * 0.5 for name, tensor in fp.build(root / "med1.5").model.vision_tower.state_dict().items()}
    state = text_state(BASE, groups=2, seed=2) | projector_state(2)
    state |= {f"model.vision_tower.vision_tower.vision_model.{name}": tensor for name, tensor in other.items()}
    write_folder(tmp_path / "own", config_of(2, 1e6, **V1_5 | {"mm_vision_tower": str(root / "clip")}), state)
    assert "image encoder of the checkpoint" in convert(tmp_path / "own", tmp_path / "out").notes
    tower = fp.build(tmp_path / "out").model.vision_tower.state_dict()
    assert all(torch.equal(tower[name], tensor) for name, tensor in other.items())
    report = convert(tmp_path / "own", tmp_path / "given", clip=root / "ViT.pt")
    assert any("left out the checkpoint's own" in note for note in report.notes)
    tower = fp.build(tmp_path / "given").model.vision_tower.state_dict()
    assert all(torch.equal(tower[name], 2 * tensor) for name, tensor in other.items())


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("where", ["beside", "given", "in the checkpoint"])
def test_connectors(root, tmp_path, depth, where):
    """A connector in the checkpoint, as mm_projector.bin beside it, or in a file that is given."""
    config = config_of(2, 1e6, **V1_5 | {"mm_projector_type": "linear" if depth == 1 else f"mlp{depth}x_gelu"})
    state, connector = text_state(BASE, groups=2, seed=2), projector_state(depth)
    write_folder(tmp_path / "whole", config, state | (connector if where == "in the checkpoint" else {}))
    file = tmp_path / ("whole" if where == "beside" else ".") / "mm_projector.bin"
    more = {"mm_projector": file} if where == "given" else {}
    if where != "in the checkpoint":
        torch.save(connector, file)
    convert(tmp_path / "whole", tmp_path / "out", clip=root / "clip", **more)
    found = [t for _, t in sorted(fp.build(tmp_path / "out", dtype=torch.float64).model.multi_modal_projector.named_parameters())]
    wanted = sorted((name.replace("weight", "z"), tensor) for name, tensor in connector.items())
    assert len(found) == 2 * depth and all(torch.equal(a, b) for a, (_, b) in zip(found, wanted, strict=True))


def test_a_connector_alone(root, tmp_path):
    """LLaVA after its first stage: mm_projector.bin with embeddings of <im_start> and <im_end>, on a LLaMA without them."""
    new = torch.arange(2.0 * DIM, dtype=torch.float64).view(2, DIM)
    torch.save(projector_state() | {"model.embed_tokens.weight": new}, tmp_path / "mm_projector.bin")
    convert(tmp_path / "mm_projector.bin", tmp_path / "out", llama=root / "llama", clip=root / "clip")
    network = fp.build(tmp_path / "out", dtype=torch.float64)
    embeddings, base = network.get_input_embeddings().weight, text_state()["model.embed_tokens.weight"]
    assert torch.equal(embeddings[:BASE], base) and torch.equal(embeddings[-2:], new) and len(embeddings) == BASE + 4
    torch.testing.assert_close(embeddings[BASE], base.mean(0), rtol=1e-6, atol=1e-6)
    assert network.config.mm_use_im_start_end and load_causal_tokenizer(tmp_path / "out").convert_tokens_to_ids("<im_end>") == BASE + 3
    with pytest.raises(ValueError, match=r"a connector alone: give llama .* and clip"):
        convert(tmp_path / "mm_projector.bin", tmp_path / "other")


CASES = {  # what is changed: (config, tensors, options) -> message
    "no clip": (MED, {}, {"clip": None}, "openai/clip-vit-large-patch14 is not on this machine, and nothing is downloaded: give clip"),
    "biomed": (MED | {"mm_vision_tower": "microsoft/BiomedCLIP-x"}, {}, {"clip": None}, "a ViT of timm's: only CLIP's converts"),
    "connector": (MED | {"mm_projector_type": "qformer"}, {}, {}, "mm_projector_type 'qformer' is no connector known here: linear"),
    "another connector": (MED | {"mm_projector_type": "mlp2x_gelu"}, {}, {}, "mm_projector holds bias, weight, and mlp2x_gelu has 0.bias"),
    "tiles": (MED | {"image_aspect_ratio": "anyres"}, {}, {}, "anyres cuts images into tiles"),
    "layer": (MED | {"mm_vision_select_layer": -9}, {}, {}, "mm_vision_select_layer -9 is no layer of a CLIP of 3"),
    "feature": (MED | {"mm_vision_select_feature": "cls"}, {}, {}, "mm_vision_select_feature 'cls' is neither patch nor cls_patch"),
    "stranger": (MED, {"model.extra.weight": torch.ones(2)}, {}, "1 tensors that are none of LLaVA's: model.extra.weight"),
    "shape": (MED, {"model.norm.weight": torch.ones(3)}, {}, r"misshapen: model.language_model.norm.weight \(3,\) instead of \(64,\)"),
    "missing": (MED, {"model.layers.1.mlp.up_proj.weight": None}, {}, "1 missing: model.language_model.layers.1.mlp.up_proj.weight"),
    "option": (MED, {}, {"image_size": 3}, "a folder's config fixes image size and heads: leave them out"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be(root, tmp_path, case, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    config, tensors, options, message = CASES[case]
    state = {n: t for n, t in (text_state(BASE + 4, seed=1) | projector_state() | tensors).items() if t is not None}
    write_folder(tmp_path / "folder", config_of(**config), state, tokens=TOKENS)
    options = {"llama": root / "llama", "clip": root / "clip"} | options
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "folder", tmp_path / "out", **{n: v for n, v in options.items() if v is not None})
    assert not (tmp_path / "out").exists()


def test_a_delta_for_another_llama(root, tmp_path):
    state = text_state(BASE - 9, seed=1) | projector_state()
    write_folder(tmp_path / "folder", config_of(**MED), state, tokens=())
    with pytest.raises(ValueError, match=r"model.embed_tokens.weight: a delta \(262, 64\) for weights \(271, 64\): made for another LLaMA"):
        convert(tmp_path / "folder", tmp_path / "out", llama=root / "llama", clip=root / "clip")


def test_padding_to_a_square(v1_5, tmp_path):
    """image_aspect_ratio pad: expand2square with CLIP's mean colour, then its resize."""
    from PIL import Image

    network = fp.build(v1_5[0])
    preprocess = causal.clip_preprocess(v1_5[0], network)
    assert isinstance(preprocess, Preprocess) and preprocess.pad
    tall = Image.new("RGB", (20, 40), (200, 10, 30))
    square = Image.new("RGB", (40, 40), (122, 116, 104))
    square.paste(tall, (10, 0))
    assert torch.equal(preprocess(tall), Preprocess.from_dict(preprocess.to_dict() | {"pad": False})(square))
    assert network.config.vision_config.hidden_size == WIDTH


def test_trains_and_is_asked_by_the_folder_alone(med, tmp_path):
    """The image's tokens are framed in training too, and the response ends in the separator."""
    tokenizer, network = load_causal_tokenizer(med[0]), fp.build(med[0])
    sample = Instruction(((QUESTION, "tell"),), tmp_path / "x.png", "vqa", "0", 0, tmp_path / "a.json")
    data = causal.dataset(network, [sample], tokenizer, None, TextOptions(max_length=900))
    assert isinstance(data, CausalDataset) and data.template == "simple" and data.ending.stop == "###"
    item = data[0]
    labelled = item["input_ids"][item["labels"] != -100].tolist()
    assert tokenizer.decode(labelled).strip() == "tell###"
    pieces = render("simple", sample, image_tokens=True, around=("<im_start>", "<im_end>"))[0][0]
    assert pieces[1:4] == ["<im_start>", IMAGE, "<im_end>"]
