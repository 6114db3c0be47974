"""A hub's name finds what `hf download` left in the local cache; where it finds nothing, it says what would help. Nothing is downloaded."""

import shutil

import pytest

import fastpeft as fp
from fastpeft.models import resolve
from fastpeft.models.family import ASSETS


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache as huggingface_hub lays it out, with miss-tiny as somebody's repository."""
    import huggingface_hub.constants as constants
    import huggingface_hub.file_download as download

    repository = tmp_path / "hub" / "models--somebody--blip-small"
    shutil.copytree(ASSETS / "miss-tiny", repository / "snapshots" / "abc123")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc123")
    for module in (constants, download):
        if hasattr(module, "HF_HUB_CACHE"):
            monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return repository / "snapshots" / "abc123"


def test_a_cached_repository_is_found_by_its_name(cache, tmp_path):
    source = resolve("somebody/blip-small")
    assert source.folder == cache and source.kind == "vqa" and not source.named
    model = fp.adapt(fp.build("somebody/blip-small"), "F/LoRA/LoRA")
    assert model.fastpeft_source["model"] == "somebody/blip-small"
    fp.save_adapter(model, tmp_path / "adapter")
    fp.load_adapter(fp.build("somebody/blip-small"), tmp_path / "adapter")


def test_a_folder_of_the_same_name_comes_first(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(cache, tmp_path / "somebody" / "blip-small")
    assert not resolve("somebody/blip-small").on_hub


@pytest.mark.parametrize("name", ["Salesforce/blip-vqa-base", "somebody/other"])
def test_what_is_not_there_says_how_to_get_it(cache, name):
    with pytest.raises(ValueError, match=f"{name}.*nothing is downloaded.*`hf download {name}`.*--local-dir DIR"):
        resolve(name)


@pytest.mark.parametrize("name, near", [("llama-7B", "llama-7b"), ("mis-tiny", "miss-tiny"), ("lavin7b", "lavin-7b")])
def test_a_name_nearly_right_is_guessed(name, near):
    with pytest.raises(ValueError, match=rf"nothing is downloaded; did you mean {near}\\?"):
        resolve(name)


@pytest.mark.parametrize("name", ["../elsewhere/model", "/no/such/folder", "a/b/c", "", "..", "./x/y"])
def test_a_path_is_no_name_of_a_hub(cache, name):
    with pytest.raises(ValueError) as raised:
        resolve(name)
    assert "hf download" not in str(raised.value)


def test_every_model_has_a_plan_of_its_paper():
    for name in ("miss-tiny", "llama-tiny", "llava-med-tiny", "excitor-tiny", "lavin-tiny"):
        source = resolve(name)
        model = fp.adapt(fp.build(source, device="meta"), source.family.plan)
        assert fp.count(model)["trainable"] > 0
