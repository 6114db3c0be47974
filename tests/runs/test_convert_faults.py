"""What conversions of LaVIN, CLIP and LLaMA refuse, and what they leave behind."""

import shutil

import pytest
import torch
from official_clip import clip_state
from official_lavin import (
    DIM,
    LAYERS,
    adapter_state,
    arguments,
    write_adapter,
    write_all,
)

from fastpeft.convert import writing as writing
from fastpeft.convert.formats import convert
from fastpeft.runs.convert import convert_run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("official"))


def test_faults_are_named(official, tmp_path):
    how, state = {"llama": official / "7B", "clip": official / "ViT.pt"}, adapter_state()
    block, normal = f"layers.{LAYERS - 1}.adapter_attn", {n: t for n, t in state.items() if "conv_D" not in n and "expert" not in n}
    bad = {n: t for n, t in state.items() if n != f"{block}.conv_D.bias"}
    bad |= {"adapter_other.bias": torch.ones(1), f"{block}.conv_A.weight": torch.ones(8, DIM), "adapter_proj.conv_B.bias": torch.ones(1)}
    cases = [
        (bad, rf"1 missing: {block}\.conv_D\.bias; 1 unexpected: adapter_other\.bias; 2 misshapen: .*\(8, 256\) instead of \(8, 256, 1\)"),
        (state | {"layers.0.adapter_mlp.conv_A.bias": torch.ones(8)}, "only adapters before attention convert"),
        (normal, "no router"),
        ({n: t for n, t in state.items() if not n.startswith("layers.2.")}, r"LLaMA of 2 layers of width 256, .* given has 3 of 256"),
        ({n: t for n, t in state.items() if not n.startswith("layers.")}, r"24 missing: layers\.0\.adapter_attn\.conv_A\.weight"),
    ]
    for content, message in cases:
        with pytest.raises(ValueError, match=rf"a\.pth: .*{message}"):
            convert_run(write_adapter(tmp_path / "a.pth", content), tmp_path / "out", **how)
    for changes, message in (
        ({"temperature": "warm"}, "temperature = 'warm'"),
        ({"temperature": 0.0}, "temperature"),
        ({"max_seq_len": 1}, "max_seq"),
    ):
        with pytest.raises(ValueError, match=message):
            convert_run(write_adapter(tmp_path / "a.pth", state, arguments(**changes)), tmp_path / "out", **how)
    assert not (tmp_path / "out").exists() and {p.name for p in tmp_path.iterdir()} == {"a.pth"}


def test_wrong_combinations(official, tmp_path):
    lavin, out = official / "lavin.pth", tmp_path / "out"
    torch.save(clip_state(width=192, layers=4), tmp_path / "other.pt")
    (tmp_path / "cut.pt").write_bytes((official / "ViT.pt").read_bytes()[:5000])
    shutil.copytree(official / "13B", tmp_path / "13B")
    whole = (tmp_path / "13B/consolidated.01.pth").read_bytes()
    (tmp_path / "13B/consolidated.01.pth").write_bytes(whole[: len(whole) // 2])
    llama, clip_file, damaged = official / "7B", official / "ViT.pt", r"no PyTorch checkpoint, or a truncated one"
    cases = [
        ((lavin, out), {}, r"lavin\.pth: LaVIN's adapters alone: give llama"),
        ((lavin, out), {"llama": llama}, "and clip"),
        ((lavin, out), {"llama": llama, "clip": tmp_path / "none.pt"}, r"none\.pt: no such file"),
        ((lavin, out), {"llama": llama, "clip": lavin}, r"lavin\.pth: no CLIP of OpenAI's"),
        ((lavin, out), {"llama": tmp_path, "clip": clip_file}, "no LLaMA: neither params.json nor"),
        (
            (lavin, out),
            {"llama": tmp_path / "13B", "clip": clip_file},
            rf"13B: consolidated\.01\.pth: {damaged}",
        ),
        ((lavin, out), {"llama": llama, "clip": tmp_path / "cut.pt"}, rf"cut\.pt: {damaged}"),
        (
            (lavin, out),
            {"llama": llama, "clip": tmp_path / "other.pt"},
            "CLIP of 9 layers of width 128, .* given has 4 of 192",
        ),
        ((lavin, out), {"llama": llama, "clip": clip_file, "backbone": "lavin"}, "backbone is no option of LaVIN's"),
        ((llama, out), {"clip": clip_file}, "clip is no option of LLaMA's original files: it takes vicuna_delta"),
        ((clip_file, out), {"clip": clip_file}, "clip is no option of OpenAI's CLIP"),
    ]
    for arguments_, options, message in cases:
        with pytest.raises(ValueError, match=message):
            convert_run(*arguments_, **options)
    assert not out.exists()


def test_old_weights_do_not_stay_beside_new_ones(official, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "SHARD_BYTES", 1 << 20)
    convert(official / "7B", tmp_path / "out")
    (tmp_path / "out/mine.txt").write_text("mine")
    assert (tmp_path / "out/model.safetensors.index.json").is_file()
    monkeypatch.undo()
    convert(official / "7B", tmp_path / "out", overwrite=True)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors", "mine.txt"}


def test_no_more_than_a_shard_is_held(tmp_path):
    alive, most = 0, 0

    class Counted(torch.Tensor):
        def __del__(self):
            nonlocal alive
            alive -= 1

    def tensors():
        nonlocal alive, most
        for i in range(12):
            alive, most = alive + 1, max(most, alive + 1)
            yield f"t{i}", torch.ones(1000).as_subclass(Counted)

    assert writing.write_tensors(tmp_path, tensors(), shard_bytes=9000) == 12
    assert most <= 4 and len(list(tmp_path.glob("model-*-of-00006.safetensors"))) == 6
