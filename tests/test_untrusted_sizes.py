"""What files declare is compared with what they hold before memory is taken; and values of another kind are named in one line."""

import json
import shutil
import time
import zipfile

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import fastpeft as fp
from fastpeft.caching.store import read_header
from fastpeft.convert.reading import read_file
from fastpeft.data import load_image, load_samples
from fastpeft.report.report import write_report

SMALL = {"image_size": 32, "hidden_size": 32, "heads": 2, "vision_layers": 1, "text_layers": 1, "vocab_size": 64}


@pytest.fixture(autouse=True)
def no_large_memory(monkeypatch):
    """Whatever asks for more than 256 MB at once fails the test."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 << 10


def small(**more):
    return fp.build("miss-tiny", pretrained=False, **SMALL, **more)


@pytest.mark.parametrize(
    "plan, option",
    [("F/LoRA/F", {"r": 10**7}), ("F/Prefix/F", {"num_virtual_tokens": 10**9}), ("F/PTv2/F", {"num_virtual_tokens": 10**9})],
)
def test_an_adapter_of_another_size_takes_no_memory(tmp_path, plan, option):
    adapter = fp.save_adapter(fp.adapt(small(), plan), tmp_path / "a")
    about = json.loads((adapter / "fastpeft.json").read_text())
    (name,) = about["treatments"]["jtm"][0]
    about["treatments"]["jtm"][0][name] |= option
    (adapter / "fastpeft.json").write_text(json.dumps(about))
    config = json.loads((adapter / "jtm" / "adapter_config.json").read_text())
    (adapter / "jtm" / "adapter_config.json").write_text(json.dumps(config | option))
    model = small()
    with pytest.raises(ValueError, match=r"\d+ misshapen"):
        fp.load_adapter(model, adapter)
    assert getattr(model, "fastpeft_plan", None) is None and all(p.requires_grad for p in model.parameters())


def test_an_expression_that_never_ends(tmp_path):
    adapter = fp.save_adapter(fp.adapt(small(), "F/LoRA/F"), tmp_path / "a")
    about = json.loads((adapter / "fastpeft.json").read_text())
    about["treatments"]["jtm"][0]["LoRA"]["target_modules"] = r"(x+x+)+y|((\w|\.|[a-z])+)+[0-9]{3}"
    (adapter / "fastpeft.json").write_text(json.dumps(about))
    began = time.process_time()
    with pytest.raises(ValueError, match="takes too long to match"):
        fp.load_adapter(small(), adapter)
    assert time.process_time() - began < 5


CONFIG = {
    "layers": ({"text_config": {"num_hidden_layers": 10**6}}, r"text_config\.num_hidden_layers = '1000000': its files hold \d+ tensors"),
    "vocabulary": ({"text_config": {"vocab_size": 10**9}}, r"describes a model of [\d,]+ parameters, and its files have [\d,]+ bytes"),
    "no heads": ({"text_config": {"num_attention_heads": 0}}, r"text_config\.num_attention_heads = '0': it must be 1 or more"),
    "activation": ({"text_config": {"hidden_act": "swishy"}}, r"text_config\.hidden_act = 'swishy' is no activation"),
    "another kind": ({"text_config": {"hidden_size": "wide"}}, r"config\.json: no model is made of it: .*hidden_size"),
    "beyond": ({"text_config": {"hidden_size": 10**12}}, r"hidden_size = '1000000000000': that is beyond any model"),
    "architectures": ({"architectures": 0.5}, None),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("model") / "blip"
    small().save_pretrained(where)
    return where


@pytest.mark.parametrize("case", CONFIG)
def test_a_models_configuration(folder, tmp_path, case):
    change, message = CONFIG[case]
    path = shutil.copytree(folder, tmp_path / "blip") / "config.json"
    config = json.loads(path.read_text())
    for name, value in change.items():
        config[name] = config[name] | value if isinstance(value, dict) else value
    path.write_text(json.dumps(config))
    if message is None:
        fp.build(path.parent)
        return
    with pytest.raises(ValueError, match=message) as error:
        fp.build(path.parent)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_rotary_embedding_nobody_knows(tmp_path):
    small_llama = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    fp.build("llama-tiny", pretrained=False, **small_llama).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}))
    with pytest.raises(ValueError, match=r"config\.json: .*spiral"):
        fp.build(tmp_path)


def test_a_named_model_larger_than_the_machine():
    with pytest.raises(ValueError, match=r"its weights take [\d.]+ GB, and this machine has"):
        fp.build("miss-tiny", pretrained=False, vocab_size=2 * 10**9)
    with pytest.raises(ValueError, match="beyond any model"):
        fp.build("miss-tiny", pretrained=False, text_layers=10**6)


ODD = {
    "sparse": (lambda: torch.eye(3).to_sparse(), "a is sparse"),
    "meta": (lambda: torch.empty(3, device="meta"), "a is on the meta device"),
    "expanded": (lambda: torch.zeros(1).expand(10**12), r"a is \[1000000000000\] over a memory of 4 bytes"),
}


@pytest.mark.parametrize("kind", ODD)
def test_tensors_without_values_of_their_own(tmp_path, kind):
    made, message = ODD[kind]
    torch.save({"model": {"a": made()}}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=message):
        read_file(tmp_path / "a.pth")


def test_an_archive_that_would_unpack_to_more_than_it_is(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt", "a", zipfile.ZIP_DEFLATED) as archive, archive.open("a/data/99", "w") as entry:
        for _ in range(64):
            entry.write(bytes(1 << 20))
    with pytest.raises(ValueError, match=r"it would unpack to 67,\d+,\d+ bytes, and has"):
        read_file(tmp_path / "a.pt")


@pytest.mark.parametrize("change", [{"shape": [10**12]}, {"shape": [-2, -3]}, {"shape": [True, 6]}, {"data_offsets": [0, 2**70]}])
def test_a_crafted_header_of_a_feature_file(tmp_path, change):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.arange(6.0).view(2, 3)}, path, metadata={"crc32": json.dumps({"a": 1})})
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    header["a"] |= change
    crafted = json.dumps(header).encode()
    path.write_bytes(len(crafted).to_bytes(8, "little") + crafted + whole[8 + length :])
    with pytest.raises(ValueError, match=r"a: its (shape is not its bytes'|header holds another thing than numbers)"):
        read_header(path)


@pytest.mark.parametrize("mode, pixels", [("I;16", 50_000_000), ("F", 40_000_001), ("RGB", 50_000_000)])
def test_an_images_bytes_are_estimated_before_it_is_decoded(tmp_path, monkeypatch, mode, pixels):
    Image.new(mode, (4, 4)).save(tmp_path / "a.tiff")
    monkeypatch.setattr("PIL.TiffImagePlugin.TiffImageFile.load", lambda self: pytest.fail("decoded"))
    monkeypatch.setattr("PIL.TiffImagePlugin.TiffImageFile.width", property(lambda self: pixels), raising=False)
    monkeypatch.setattr("PIL.TiffImagePlugin.TiffImageFile.height", property(lambda self: 1), raising=False)
    if mode == "F":
        with pytest.raises(ValueError, match=r"too large to decode safely \([\d,]+ bytes to decode"):
            load_image(tmp_path / "a.tiff")
    else:
        with pytest.raises(pytest.fail.Exception):
            load_image(tmp_path / "a.tiff")


def test_the_image_folder_itself_may_be_a_link_and_no_other(tmp_path):
    data, elsewhere = tmp_path / "data", tmp_path / "cluster" / "images"
    data.mkdir()
    elsewhere.mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(elsewhere / "a.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    (data / "images").symlink_to(elsewhere)
    entry = {"img_name": "a.png", "question": "q", "answer": "a", "q_lang": "en", "answer_type": "OPEN", "qid": 1}
    (data / "train.json").write_text(json.dumps([entry]))
    assert load_samples(data)[0].image == elsewhere / "a.png"
    (elsewhere / "b.png").symlink_to(tmp_path / "secret.png")
    for name in ("b.png", "../secret.png", str(tmp_path / "secret.png")):
        (data / "train.json").write_text(json.dumps([entry | {"img_name": name}]))
        with pytest.raises(ValueError, match="is refused"):
            load_samples(data)


def test_a_report_shows_images_of_the_run_and_its_data_only(tmp_path):
    out, data, private = tmp_path / "run", tmp_path / "data", tmp_path / "private.png"
    out.mkdir()
    data.mkdir()
    Image.new("RGB", (4, 4)).save(private)
    Image.new("RGB", (4, 4)).save(data / "a.png")
    (out / "link.png").symlink_to(private)
    asked = [{"qid": str(i), "question": "q", "answer": "a", "prediction": "a", "correct": True} for i in range(3)]
    for row, image in zip(asked, (private, data / "a.png", out / "link.png")):
        row["image"] = str(image)
    (out / "summary.json").write_text("{}")
    (out / "predictions.json").write_text(json.dumps(asked))
    assert write_report(out).read_text().count("data:image/jpeg") == 0
    assert write_report(out, data=[data]).read_text().count("data:image/jpeg") == 1


@pytest.mark.parametrize("change", ["random state", "moments", "not finite", "sparse"])
def test_a_checkpoints_state_of_other_shapes_changes_nothing(runs, phantoms, tmp_path, change):
    out = tmp_path / "run"
    runs.trainer(phantoms, out=out, steps=1, feature_cache=False).fit()
    held = torch.load(out / "checkpoint" / "optimizer.pt")
    moments = held["optimizer"]["adamw"]["state"][0]
    if change == "random state":
        held["rng"] = torch.zeros(3, dtype=torch.uint8)
    elif change == "moments":
        moments["exp_avg"] = torch.zeros(3)
    elif change == "not finite":
        moments["exp_avg_sq"] = moments["exp_avg_sq"].fill_(float("inf"))
    else:
        moments["exp_avg"] = moments["exp_avg"].to_sparse()
    torch.save(held, out / "checkpoint" / "optimizer.pt")
    (out / "checkpoint" / "manifest.json").unlink()
    trainer = runs.trainer(phantoms, out=out, steps=2, feature_cache=False, resume=True)
    before, random = runs.weights(trainer), torch.get_rng_state()
    with pytest.raises(ValueError, match=r"checkpoint in .* (does not fit this run's optimiser|is damaged)") as error:
        trainer.fit()
    runs.assert_same_weights(runs.weights(trainer), before)
    assert "\n" not in str(error.value) and load_file(out / "checkpoint" / "trained.safetensors") and random is not None
