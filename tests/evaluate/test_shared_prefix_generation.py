"""Answers generated after what all prompts begin with: those of the prompts by themselves, token for token."""

import dataclasses
import importlib
from pathlib import Path

import pytest
import torch

import fastpeft as fp
from fastpeft.data.prompts import Ending
from fastpeft.evaluate.responses import respond
from fastpeft.fused.attention import prefix_cache
from fastpeft.fused.attention.prefix_cache import SharedPrefixCache, generate_after

attention_module = importlib.import_module("fastpeft.ops.attention")  # fastpeft.ops has the function under that name
CASES = [
    ("llava-med-tiny", "F/F/LoRA/F", 4),
    ("llava-med-tiny", "F/F/Prefix/F", 2),
    ("lavin-tiny", "MMAdapter/T/MMAdapter", 4),
    ("excitor-tiny", "F/Excitor", 2),
    ("excitor-tiny", "F/AdaptionPrompt", 2),
]


def built(name, plan, kv_heads=4):
    torch.manual_seed(0)
    model = fp.adapt(fp.build(name, pretrained=False, text_config={"num_key_value_heads": kv_heads, "num_hidden_layers": 3}), plan)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.05 * torch.randn_like(p)
    return model.eval()


def prompts(model, common=80, ends=(5, 9, 3, 7)):
    """Questions about one image that begin alike, padded on the left, as ``generate`` takes them; and how many tokens they share."""
    config = model.config
    places = getattr(config, "visual_tokens", 0) or getattr(config, "image_seq_length", 0)
    drawn = lambda n: torch.randint(4, config.text_config.vocab_size - 4, (n,))  # noqa: E731
    start = torch.cat([drawn(3), torch.zeros(places, dtype=torch.int64), drawn(common - 3)])
    rows = [torch.cat([start, drawn(n)]) for n in ends]
    width = max(map(len, rows))
    ids, mask, seen = (torch.zeros(len(rows), width, dtype=torch.int64) for _ in range(3))
    for b, row in enumerate(rows):
        ids[b, width - len(row) :], mask[b, width - len(row) :] = row, 1
        seen[b, width - len(row) + 3 : width - len(row) + 3 + places] = 1
    size = config.vision_config.image_size
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(1, 3, size, size)}
    inputs |= {"image_index": torch.zeros(len(rows), dtype=torch.int64)} | ({"image_mask": seen.bool()} if places else {})
    return inputs, common + places


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name, plan, kv_heads", CASES)
def test_token_for_token(name, plan, kv_heads, beams):
    model = built(name, plan, kv_heads)
    inputs, shared = prompts(model)
    how = {"max_new_tokens": 8, "num_beams": beams, "eos_token_id": 2, "pad_token_id": 0}
    want = model.generate(**inputs, **how)
    assert torch.equal(model.generate(**inputs, **how, prefix_length=shared), want)
    assert len(set(want[:, -8:].flatten().tolist())) > 4  # not one token over and over


def test_a_beginning_is_kept_once(monkeypatch):
    """Keys and values of P tokens without a batch, read where they lie: attention to them is no copy for each sample and beam."""
    model = built("llava-med-tiny", "F/F/LoRA/F")
    inputs, shared = prompts(model)
    made, joined = [], []

    class Spied(SharedPrefixCache):
        def __init__(self, prefix):
            super().__init__(prefix)
            made.append(self)

    monkeypatch.setattr(prefix_cache, "SharedPrefixCache", Spied)
    join = attention_module.join_prefix
    monkeypatch.setattr(attention_module, "join_prefix", lambda *given: joined.append(given[3]) or join(*given))
    model.generate(**inputs, max_new_tokens=3, num_beams=2, eos_token_id=2, pad_token_id=0, prefix_length=shared)
    (cache,) = made
    heads = model.config.text_config.num_key_value_heads
    assert [k.shape[:2] for k, _ in cache.prefix] == [(heads, shared)] * 3 and cache.get_seq_length() <= 9 + 3
    assert len(joined) == 3 * 3 and {pk.data_ptr() for pk in joined} == {k.data_ptr() for k, _ in cache.prefix}


@dataclasses.dataclass
class Asked:
    image: Path | None


class Prompts(torch.utils.data.Dataset):
    """What :func:`respond` reads of a data set of prompts."""

    prompts_only, load_images, ending = True, True, Ending()

    def __init__(self, model):
        from fastpeft.data import CausalCollator

        inputs, _ = prompts(model)
        self.pixels = inputs["pixel_values"][0]
        self.rows = [(inputs["input_ids"][b][m := inputs["attention_mask"][b].bool()], inputs["image_mask"][b][m]) for b in range(4)]
        self.samples, self.collator = [Asked(Path("a"))] * 4, lambda: CausalCollator(0, padding_side="left")
        self.inputs, self.tokenizer = ("input_ids", "attention_mask", "image_mask", "pixel_values", "image_index"), Letters()
        self.lengths = [len(ids) for ids, _ in self.rows]

    def __len__(self):
        return 4

    def text_item(self, index):
        ids, places = self.rows[index]
        return {"sample": self.samples[index], "input_ids": ids, "image_mask": places}

    def __getitem__(self, index):
        return self.text_item(index) | {"pixel_values": self.pixels}


class Letters:
    pad_token_id, eos_token_id = 0, 2

    def batch_decode(self, rows, skip_special_tokens):
        return [" ".join(map(str, row.tolist())) for row in rows]


def test_respond_asks_after_a_common_beginning(monkeypatch):
    """All questions of an image in one batch, after what they share; answers are those without."""
    model = built("llava-med-tiny", "F/F/LoRA/F")
    torch.manual_seed(3)
    data, told = Prompts(model), []
    own = type(model).generate
    monkeypatch.setattr(type(model), "generate", lambda self, *a, **k: told.append(k.get("prefix_length", 0)) or own(self, *a, **k))
    answers = respond(model, data, max_new_tokens=5, progress=False)
    assert told[0] >= 80
    monkeypatch.setattr("fastpeft.evaluate.responses.WORTH_A_BATCH", 1 << 30)
    told.clear()
    assert respond(model, data, max_new_tokens=5, progress=False) == answers and not any(told)


def test_what_cannot_be():
    model = built("llava-med-tiny", "F/F/LoRA/F")
    inputs, shared = prompts(model)
    embeds, mask = model.get_input_embeddings()(inputs["input_ids"]), inputs["attention_mask"]
    with pytest.raises(ValueError, match="must have tokens of its own"):
        generate_after(model, shared + 3, embeds, mask, {}, max_new_tokens=2)
    with pytest.raises(ValueError, match="padded on the left"):
        generate_after(model, shared, embeds, mask.flip(1), {}, max_new_tokens=2)
