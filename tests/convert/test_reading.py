"""Pickles are read without running what they hold."""

import os
import pickle
import sys
import types
from collections import OrderedDict

import pytest
import torch
from official_miss import official_again, official_state, same, write

from fastpeft.convert import reading as reading
from fastpeft.convert.formats import convert


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
    monkeypatch.setattr(reading, "get_unsafe_globals_in_checkpoint", lambda path: ["ruamel.yaml.comments.LineCol"])
    with pytest.raises(ValueError, match=r"holds posix\.system, not only tensors: refused"):
        convert(path, tmp_path / "hf")
    assert sorted(os.listdir(tmp_path)) == ["a.pth"]
