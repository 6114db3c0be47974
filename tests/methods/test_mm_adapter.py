"""MMAdapter and RepAdapter as methods: what they add, that they begin as the identity, and what they refuse."""

import pytest
import torch
from lavin_batches import PLAN, lavin_pixels, lavin_samples, padded, randomise  # noqa: F401 - fixtures

import fastpeft as fp

BLOCK = "MMAdapter(position=block)/T/MMAdapter(position=block)"  # twice the adapters, one neck
ROWS = {("lavin-7b", PLAN): 3_781_296, ("lavin-13b", PLAN): 5_390_080, ("lavin-7b", "MMAdapter/T/RepAdapter"): 2_863_728}
ROWS |= {("lavin-7b", BLOCK): 2 * (24 * 20_490 + 32 * 81_930) + 667_776}


@pytest.mark.parametrize("name, plan", ROWS)
def test_counts(name, plan):
    assert fp.count(fp.adapt(fp.build(name, device="meta"), plan))["trainable"] == ROWS[name, plan]


def test_new_adapters_change_nothing(samples, pixels):
    model = fp.build("lavin-tiny", dtype=torch.float64)
    want = model(**padded(samples, pixels)).loss
    fp.adapt(model, PLAN)
    torch.testing.assert_close(model.train()(**padded(samples, pixels)).loss, want)


def test_dropout_is_of_training(samples, pixels):
    model = randomise(fp.adapt(fp.build("lavin-tiny", dtype=torch.float64), PLAN, dropout=0.5))
    batch = padded(samples, pixels)
    assert torch.equal(model.eval()(**batch).loss, model(**batch).loss)
    assert not torch.equal(model.train()(**batch).loss, model(**batch).loss)


def test_both_positions_on_disk(samples, pixels, tmp_path):
    model = randomise(fp.adapt(fp.build("lavin-tiny", dtype=torch.float64), BLOCK))
    fp.save_adapter(model, tmp_path / "adapter")
    again = fp.load_adapter(fp.build("lavin-tiny", dtype=torch.float64), tmp_path / "adapter")
    batch = padded(samples, pixels)
    assert torch.equal(again.eval()(**batch).loss, model.eval()(**batch).loss)
    with pytest.raises(ValueError, match="options included: vision's MMAdapter has position='block' not 'attn' in the folder; llm's"):
        fp.load_adapter(fp.adapt(fp.build("lavin-tiny", dtype=torch.float64), PLAN), tmp_path / "adapter")
    assert fp.restore(model)
    torch.testing.assert_close(model(**batch).loss, again(**batch).loss, rtol=1e-8, atol=0)
    places = [place.before for place in model.mixtures()["text"]]
    assert places == ["mm_adapter", "mm_adapter_mlp"] * 4


def test_what_cannot_be():
    model = fp.adapt(fp.build("llama-tiny"), "MMAdapter")
    with pytest.raises(ValueError, match="MMAdapter routes by a modality token"):
        model(torch.ones(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="groups = 3 must divide h = 8"):
        fp.adapt(fp.build("llama-tiny"), llm=fp.RepAdapter(groups=3))
    with pytest.raises(ValueError, match="position must be one of attn, block, not 'mlp'"):
        fp.MMAdapter(position="mlp")
