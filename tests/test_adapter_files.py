"""Adapter folders that contradict themselves, and tensors that are no finite numbers: refused by file and key, at every door."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastpeft as fp
from fastpeft import cli

pytestmark = pytest.mark.usefixtures("one_thread")


def edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"lora_alpha": 16}, r"it describes LoRA\(.*lora_alpha=16.*, and the plan has LoRA\(.*lora_alpha=32"),
        ({"use_rslora": True}, "it describes .*use_rslora=True"),
        ({"alora_invocation_tokens": [1]}, r"alora_invocation_tokens=\[1\] is not supported"),
        ({"use_future_maths": True}, "use_future_maths=True is not supported"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3', and the plan has LoRA"),
        ({"r": None}, "r must be a positive integer"),
    ],
)
def test_a_configuration_beside_ours_that_says_something_else(miss, tmp_path, fields, said):
    """PEFT may have loaded a part's folder and saved another adapter over it."""
    folder = fp.save_adapter(miss.build("F/LoRA/LoRA"), tmp_path / "a")
    edit(folder / "dec" / "adapter_config.json", **fields)
    with pytest.raises(ValueError, match=rf"dec.adapter_config\.json: .*{said}"):
        fp.load_adapter(miss.build(), folder)


def test_a_folder_that_nothing_reads(miss, tmp_path):
    folder = fp.save_adapter(miss.build("F/LoRA/LoRA"), tmp_path / "a")
    (folder / "dec").rename(folder / "decoder")
    (folder / "fastpeft.json").unlink()
    with pytest.raises(ValueError, match=r"holds adapters in decoder that no part of the plan F/LoRA/F reads; rename or remove them"):
        fp.load_adapter(miss.build(), folder)
    (folder / "decoder").rename(folder / "inner")
    (folder / "dec").mkdir()
    (folder / "inner").rename(folder / "dec" / "other")  # as PEFT saves an adapter that is not called default
    with pytest.raises(ValueError, match=r"holds adapters in dec.other that no part of the plan F/LoRA/F reads"):
        fp.load_adapter(miss.build(), folder)
    folder = fp.save_adapter(miss.build("F/LoRA/LoRA"), tmp_path / "b")
    about = json.loads((folder / "fastpeft.json").read_text())
    edit(folder / "fastpeft.json", treatments=about["treatments"] | {"jtm": [{"F": {}}]})
    with pytest.raises(ValueError, match="holds adapters in jtm that no part of the plan F/F/LoRA reads"):
        fp.load_adapter(miss.build(), folder)


@pytest.mark.parametrize("treatments", [{"dec": [{"LoRA": {"use_future_maths": True}}]}, {"dec": [{"Future": {}}]}, {"head": ["T"]}])
def test_unknown_names_in_our_own_description(miss, tmp_path, treatments):
    folder = fp.save_adapter(miss.build("F/F/LoRA"), tmp_path / "a")
    edit(folder / "fastpeft.json", treatments=treatments)
    with pytest.raises(ValueError, match=r"fastpeft\.json: .*(use_future_maths|Future|head)"):
        fp.load_adapter(miss.build(), folder)


def test_a_tensor_under_its_old_and_its_new_name(tmp_path):
    folder = fp.save_adapter(fp.adapt(fp.build("llama-tiny"), "Excitor"), tmp_path / "a")
    path = folder / "llm" / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(name for name in tensors if name.endswith("gate"))
    old = key.removeprefix("base_model.model.").replace("excitor_blocks.", "")
    save_file(tensors | {old: tensors[key] + 1}, path)
    with pytest.raises(ValueError, match=rf"1 tensors are there twice, under the old name and PEFT's: {old}"):
        fp.load_adapter(fp.build("llama-tiny"), folder)


HOLDERS = [
    *(("miss-tiny", plan) for plan in ("F/LoRA/IA3", "T/LayerNorm/PTv2", "F/FFN/Prefix")),
    *(("llama-tiny", plan) for plan in ("Excitor", "AdaptionPrompt", "RepAdapter")),
    ("lavin-tiny", "MMAdapter/T/MMAdapter"),
]
BAD = {
    "NaN": lambda t: t.index_fill(-1, torch.tensor([0]), torch.nan),
    "infinite": lambda t: t.index_fill(-1, torch.tensor([t.shape[-1] - 1]), -torch.inf),
    "int32": lambda t: t.int(),
    "complex": lambda t: t.to(torch.complex64),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
}
SAID = {"NaN": "NaN or an infinity in {}", "infinite": "NaN or an infinity in {}"}


@pytest.mark.parametrize("name, plan", HOLDERS, ids=lambda value: value)
def test_tensors_that_are_no_finite_numbers(miss, tmp_path, name, plan):
    """Every method's files: which file and which key, and nothing is loaded."""
    base = miss.build if name == "miss-tiny" else lambda: fp.build(name, pretrained=False)
    model = fp.adapt(base(), plan)
    folder = fp.save_adapter(model, tmp_path / "a")
    before = {key: t.clone() for key, t in model.state_dict().items()}
    for path in sorted(folder.rglob("*.safetensors")):
        tensors = load_file(path)
        key = sorted(tensors)[-1]
        for kind, spoil in BAD.items():
            save_file(tensors | {key: spoil(tensors[key].float())}, path)
            with pytest.raises(ValueError) as error:
                fp.load_adapter(model, folder)
            said = SAID.get(kind, "adapters are float64, float32, bfloat16 or float16, and {} is torch.").format(key)
            assert str(error.value).startswith(f"{path}: {said}") and "nothing was loaded" in str(error.value), kind
        save_file(tensors, path)
    assert all(torch.equal(before[key], t) for key, t in model.state_dict().items())
    fp.load_adapter(model, folder)


def test_values_too_large_for_a_half_precision_base(miss, tmp_path):
    folder = fp.save_adapter(miss.build("F/F/T", dtype=torch.float32), tmp_path / "a")
    path = folder / "dec" / "model.safetensors"
    tensors = load_file(path)
    key = "bert.encoder.layer.1.output.dense.weight"
    save_file(tensors | {key: tensors[key].clone().fill_(1e6)}, path)
    with pytest.raises(ValueError, match=rf"1 too large for the model's dtype: {key} in torch\.float16"):
        fp.load_adapter(miss.build(dtype=torch.float16), folder)
    fp.load_adapter(miss.build(dtype=torch.bfloat16), folder)


@pytest.fixture(scope="module")
def run_folder(runs, phantoms, tmp_path_factory):
    """An adapter as a training run leaves it."""
    from fastpeft.data import Preprocess
    from fastpeft.data.tokenizer import save_tokenizer

    words, more = runs.tokenizer(phantoms), {"tokenizer": "tokenizer", "preprocess": Preprocess(32, (0.5,) * 3, (0.5,) * 3).to_dict()}
    write = lambda folder: save_tokenizer(words, folder / "tokenizer")  # noqa: E731
    model = runs.trainer(phantoms).model
    return fp.save_adapter(model, tmp_path_factory.mktemp("run") / "adapter", description=more, write_more=write)


@pytest.mark.parametrize("door", ["eval", "merge"])
def test_one_line_at_the_commands(run_folder, phantoms, tmp_path, monkeypatch, capfd, door):
    path, config = (run_folder / "dec" / name for name in ("adapter_model.safetensors", "adapter_config.json"))
    good, text = load_file(path), config.read_text()
    arguments = {"eval": ["--data", str(phantoms)], "merge": ["--out", str(tmp_path / "merged")]}[door]
    monkeypatch.setattr(sys, "argv", ["fastpeft", door, "--adapter", str(run_folder), *arguments])

    def told():
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        _, err = capfd.readouterr()
        assert stop.value.code == 2 and err.count("\n") == 1 and err.startswith("fastpeft: ")
        return err

    try:
        key = sorted(good)[0]
        save_file(good | {key: torch.full_like(good[key], torch.nan)}, path)
        assert f"{path}: NaN or an infinity in {key}" in told()
        save_file(good, path)
        edit(config, alora_invocation_tokens=[4])
        assert "alora_invocation_tokens=[4] is not supported" in told()
    finally:
        save_file(good, path)
        config.write_text(text)
