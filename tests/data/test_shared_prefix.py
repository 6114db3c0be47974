"""Samples that begin alike: what is shared, the rows of batches, and SharedPrefixCollator under transformers' own models."""

import dataclasses
import random
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import fastpeft as fp
from fastpeft.data import CausalCollator, SharedPrefixCollator
from fastpeft.data.causal_batches import sharing_note
from fastpeft.data.shared_prefix import Saved, Sharing, most_shared, share, with_images
from fastpeft.labels import IGNORE_INDEX

SHAPE = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
SHAPE |= {"num_key_value_heads": 2, "initializer_range": 0.2, "use_cache": False}


@dataclasses.dataclass
class Asked:
    image: Path | None = None


def item(text, image=None, labelled=2, placed=True):
    """Words of one letter: an item of a CausalDataset, its last tokens labelled; "#" is a place of the image, in a model that has such."""
    ids = torch.tensor([ord(c) - 60 for c in text])
    labels = ids.masked_fill(torch.arange(len(ids)) < len(ids) - labelled, IGNORE_INDEX)
    places = {"image_mask": torch.tensor([c == "#" for c in text])} if placed else {}
    return {"sample": Asked(None if image is None else Path(image)), "input_ids": ids, "labels": labels, **places}


def all_tokens(sharing, rows):
    """Each sample again from what the rows hold, by its number."""
    found, before = {}, []
    for index, n in zip(sharing.order, sharing.lengths):
        before = before[:n] + list(rows[index][n:])
        found[index] = before
    return found


@pytest.mark.parametrize("worth", [1, 4])
@pytest.mark.parametrize("seed", range(12))
def test_every_sample_can_be_read_again(seed, worth):
    """Random texts over two letters: the rows hold every sample, none shares more than it may, and each has tokens of its own."""
    draw = random.Random(seed)
    rows = [[draw.choice((1, 1, 1, 2)) for _ in range(draw.randint(1, 12))] for _ in range(draw.randint(1, 9))]
    limits = [draw.randint(0, len(row) - 1) for row in rows]
    roots = [draw.choice("ab") for _ in rows]
    sharing = share(rows, limits, roots, worth)
    assert sorted(sharing.order) == list(range(len(rows)))
    assert all_tokens(sharing, rows) == dict(enumerate(rows))
    assert all(n <= limits[i] for i, n in zip(sharing.order, sharing.lengths))
    pairs = list(zip(sharing.order, sharing.order[1:], sharing.lengths[1:]))
    assert all(n < min(len(rows[i]), len(rows[j])) and (n == 0 or roots[i] == roots[j]) for i, j, n in pairs)
    assert worth == 1 or sharing.saved() <= share(rows, limits, roots, 1).saved()


def test_what_is_shared_where_it_pays():
    """A beginning of all, a longer one of some, and one too short to pay; equal numbers of an image are shared whole or not at all."""
    a = [9] * 20
    rows = [a + [1] * 20 + [5, 6], a + [1] * 20 + [7, 6], [*a, 2, 3], [*a, 2, 4], [8, 8]]
    sharing = share(rows, [len(row) - 1 for row in rows])
    assert sharing == Sharing((4, 0, 1, 2, 3), (0, 0, 40, 20, 20))
    assert share(rows, [len(row) - 1 for row in rows], worth=1).lengths == (0, 0, 40, 20, 21)
    assert share(rows, [38] * 5).lengths == (0, 0, 38, 20, 20)
    image = [3, *[-1] * 20, 4, 5]
    assert share([image, image], [10, 10]).lengths == (0, 0) and share([image, image], [10, 10], worth=1).lengths == (0, 1)
    assert share([image, image], [22, 10]) == Sharing((1, 0), (0, 22))  # whose labels come first, goes first
    assert share([image, image], [22, 22]).lengths == (0, 22)


def test_labels_stay_behind_tokens_of_their_own():
    """A sample's first labelled token, and the one that predicts it, are its own; one without labels keeps its last token."""
    assert most_shared([-100, -100, -100, 4, 5], 5) == 2
    assert most_shared([-100] * 4, 4) == 3 == most_shared(None, 4)
    assert most_shared([7, -100, -100, 9], 4) == 2  # no loss counts a first token's label
    assert most_shared([-100, 3], 2) == 0


def test_a_batch_of_two_images():
    """Three questions on one image, one on another, a text: one row, the images' places once, labels and positions as of each sample."""
    words, more = "ABCDEFGHIJKLMNOPQRST", "UVW"
    items = [item(f"{words}########{end}", image) for end, image in (("aaxy", "1"), ("bbxy", "1"), ("cxyz", "2"), ("dddxy", "1"))]
    items.append(item(words + more + "pq"))
    batch = CausalCollator(0, share=True)(items)
    lengths = batch["prefix_lengths"].tolist()
    assert sorted(lengths) == [0, 0, 20, 28, 28] and batch["input_ids"].shape == (1, 53 + 25)
    starts = batch["cu_seqlens"].tolist()
    assert [batch["position_ids"][0, start].item() for start in starts[:-1]] == lengths
    assert batch["image_mask"].sum() == 16 and sorted(batch["images"]) == [Path("1"), Path("2")]
    assert [sample.image for sample in batch["samples"]] == [None if i < 0 else batch["images"][i] for i in batch["image_index"]]
    assert (batch["labels"] != IGNORE_INDEX).sum() == 10 and (batch["labels"][0, starts[:-1]] == IGNORE_INDEX).all()
    assert "prefix_lengths" not in CausalCollator(0, share=False)(items)
    assert "prefix_lengths" not in CausalCollator(0, share=True)(items[:1])
    apart = [item("ABC" + end * 20) for end in "xyz"]
    assert "prefix_lengths" not in CausalCollator(0, share=True)(apart)  # nothing that pays
    unplaced = [item(f"{words}{end}xy", image, placed=False) for end, image in (("a", "1"), ("b", "2"), ("c", "1"))]
    assert sorted(CausalCollator(0, share=True)(unplaced)["prefix_lengths"].tolist()) == [0, 0, 20]  # an image seen by every token


class Texts:
    def __init__(self, items):
        self.items = items

    def text_item(self, index):
        return self.items[index]


def test_a_run_says_what_it_saves():
    """And what a template with the image first would."""
    first = Texts([item("#" * 20 + end + "xy", "1") for end in "abcd"])
    assert sharing_note(first, [[0, 1], [2, 3]]) == "samples of a batch share what they begin with: 43% fewer tokens"
    last = Texts([item(end + "#" * 20 + "xy", "1") for end in "abcd"])
    said = sharing_note(last, [[0, 1, 2, 3]])
    assert said == (
        "samples of a batch share nothing: 65% of the tokens are an image's, computed again as its question comes first; "
        "a template with the image first would share them"
    )
    assert sharing_note(last, [[0], [1]]) == "" == Saved().note()


def plain(cls=LlamaForCausalLM, config=LlamaConfig, attention="sdpa"):
    torch.manual_seed(0)
    return cls(config(**SHAPE, attn_implementation=attention)).double().train()


def texts():
    torch.manual_seed(1)
    start, other = torch.randint(3, 50, (20,)), torch.randint(3, 50, (9,))
    ends = [torch.randint(3, 50, (n,)) for n in (5, 8, 4, 6)]
    ids = [torch.cat([start, end]) for end in ends[:3]] + [torch.cat([other, ends[3]])]
    return [{"input_ids": t.tolist(), "labels": [-100] * (len(t) - 3) + t[-3:].tolist()} for t in ids]


def gradients(model, **batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def alone(model, items):
    """The mean over all labelled tokens, each sample by itself."""
    model.zero_grad()
    total = 0.0
    for one in items:
        loss = model(**{name: torch.tensor([values]) for name, values in one.items()}).loss * 3 / (3 * len(items))
        loss.backward()
        total += loss.detach()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("optimized", [False, True], ids=["transformers", "optimized"])
@pytest.mark.parametrize("attention, mask", [("sdpa", torch.bool), ("sdpa", torch.float64), ("eager", torch.float64)])
@pytest.mark.parametrize("cls, config", [(LlamaForCausalLM, LlamaConfig), (Qwen2ForCausalLM, Qwen2Config)])
def test_any_model_of_transformers(check_close, cls, config, attention, mask, optimized):
    """Loss and all gradients of the rows are those of the samples by themselves, before optimize() and after."""
    items, model = texts(), plain(cls, config, attention)
    want, exact = alone(model, items)
    collate = SharedPrefixCollator(mask_dtype=mask)
    batch = collate(items)
    assert batch["input_ids"].shape == (2, 17 + 20) and batch["attention_mask"].shape == (2, 1, 37, 37)
    assert collate.saved == Saved(25 + 28 + 24 + 15, 40, 0)
    if optimized:
        fp.optimize(model)
    loss, grads = gradients(model, **batch)
    check_close(loss, want)
    for name in exact:
        check_close(grads[name], exact[name])


@pytest.fixture
def check_close():
    # transformers' norms, rotary tables and losses are float32 in a float64 model too
    return lambda got, want: torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6, check_dtype=False)


def test_optimize_attends_by_parts(monkeypatch):
    """No product of all tokens with all: the collator's mask is taken for what it says, in any recognised stack."""
    import fastpeft.fused.attention.masks as masks

    calls = []
    monkeypatch.setattr(masks, "tree_attention", lambda *a, **k: calls.append(a[3].shared) or fp.ops.tree_attention(*a, **k))
    for cls, config in ((LlamaForCausalLM, LlamaConfig), (Qwen2ForCausalLM, Qwen2Config)):
        model = plain(cls, config)
        fp.optimize(model)
        gradients(model, **SharedPrefixCollator()(texts()[:3]))
    assert len(calls) == 4 and all(shared == (0, 20, 20) for shared in calls)


def test_images_by_their_content():
    """Equal pixels are one image, whatever tensors hold them; pixel_values are those whose places the rows have, in their order."""
    red, blue = torch.zeros(3, 2, 2), torch.ones(3, 2, 2)
    ids = [[1, *[40] * 16, 7 + i, 9, 9] for i in range(4)]
    items = [{"input_ids": t, "labels": [-100] * 18 + [9, 9], "pixel_values": p} for t, p in zip(ids, (red, blue, red.clone(), red))]
    batch = SharedPrefixCollator(image_token_id=40)(items)
    assert batch["input_ids"].shape == (2, 20 + 6) and (batch["input_ids"] == 40).sum() == 32
    rows = [blue if 8 in row else red for row in batch["input_ids"].tolist()]
    assert torch.equal(batch["pixel_values"], torch.stack(rows))
    for collate in (SharedPrefixCollator(), SharedPrefixCollator(image_token_id=41)):
        with pytest.raises(ValueError, match="image_token_id"):
            collate(items)


def test_what_is_refused():
    collate, good = SharedPrefixCollator(), {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}
    assert collate([good | {"attention_mask": [1, 1, 1]}])["labels"].tolist() == [[-100, 2, 3]]
    for change, said in (
        ({"labels": None}, "no labels"),
        ({"labels": [1, 2]}, "not both"),
        ({"input_ids": [[1, 2, 3]]}, "not both"),
        ({"input_ids": [], "labels": []}, "not both"),
        ({"attention_mask": [1, 1, 0]}, "padded"),
        ({"image_grid_thw": [1]}, "not image_grid_thw"),
    ):
        with pytest.raises(ValueError, match=said):
            collate([good, good | change])
    with pytest.raises(ValueError, match="mask_dtype"):
        SharedPrefixCollator(mask_dtype=torch.int64)


def test_numbers_of_images_are_no_tokens():
    places = torch.tensor([False, True, True, False])
    assert with_images(torch.tensor([5, 0, 0, 6]), places, 2).tolist() == [5, -3, -3, 6]
    assert with_images(torch.tensor([5, 0]), None, 2).tolist() == [5, 0]
