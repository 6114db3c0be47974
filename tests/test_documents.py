"""Documents that are no larger than they look; and every door that reads one."""

import pytest
import yaml

import fastpeft as fp
from fastpeft.documents import parse_json, parse_yaml
from fastpeft.options import read_yaml
from fastpeft.train import TrainConfig

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefghij", "bcdefghijk"))
DEEP = "[" * 5000 + "]" * 5000
TOO_DEEP = "nested too deeply"
HOSTILE = {"aliases": (BOMB, "more than 1,000,000 values"), "depth": (DEEP, TOO_DEEP), "itself": ("a: &a [*a]", TOO_DEEP)}
PLAIN = ("", "a: 1\nb: [2, {c: d}]\n", "base: &b {x: 1}\nmore: {<<: *b, y: 2}\nagain: [*b, *b]\n", "- 2024-01-01\n- ~")


@pytest.mark.parametrize("text", PLAIN)
def test_yaml_as_ever(text):
    assert parse_yaml(text) == yaml.safe_load(text)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_yaml_is_one_error(name, tmp_path):
    """The aliases stand for 31 thousand million values."""
    text, message = HOSTILE[name]
    with pytest.raises(yaml.YAMLError, match=message):
        parse_yaml(text)
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"cannot read .*recipe\.yaml: it.*{message}") as error:
        read_yaml(path, TrainConfig)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=message):
        fp.adapt(fp.build("llama-tiny", pretrained=False, device="meta"), str(path))


@pytest.mark.parametrize("digits", ["9" * 251, "-1" + "0" * 400, "1" * 10**4])
def test_whole_numbers_that_no_float_holds_are_one_error(digits):
    message = rf"it holds a whole number of {len(digits)} digits"
    for read, error, text in ((parse_json, ValueError, f'{{"a": [{digits}]}}'), (parse_yaml, yaml.YAMLError, f"a: [{digits}]")):
        with pytest.raises(error, match=message):
            read(text)
    with pytest.raises(yaml.YAMLError, match="it holds a whole number"):
        parse_yaml("a: 0x" + "f" * 260)
    held = [10**249, -(10**248), 0]
    assert parse_json(str(held)) == parse_yaml(str(held)) == held and all(map(float, held[:2]))
    assert parse_yaml(f'a: "{digits}"') == parse_json(f'{{"a": "{digits}"}}') == {"a": digits}


def test_python_objects_are_not_made():
    with pytest.raises(yaml.YAMLError):
        parse_yaml("!!python/object/apply:os.system ['true']")


def test_deep_json_is_one_error(tmp_path):
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * 10**5)
    assert parse_json(b'{"a": [1, null]}') == {"a": [1, None]}
    deep = "[" * 10**5 + "]" * 10**5
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "fastpeft.json").write_text(deep)
    with pytest.raises(ValueError, match=r"fastpeft\.json is damaged or not ours: its lists"):
        fp.load_adapter(fp.build("llama-tiny", pretrained=False), tmp_path / "adapter")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(deep)
    with pytest.raises(ValueError, match=r"config\.json"):
        fp.build(str(tmp_path / "model"))
    from fastpeft.data import load_samples

    (tmp_path / "data" / "imgs").mkdir(parents=True)
    (tmp_path / "data" / "train.json").write_text(deep)
    with pytest.raises(ValueError, match=r"train\.json.*nested too deeply"):
        load_samples(tmp_path / "data")
