"""Models whose head reads one row of each sample: the model's own losses and gradients, what is computed, and what keeps every token."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import transformers as T
from double import assert_same, step
from tiny_batches import GROUPED, PAD, TEXT, VISION, _image, _lively, _rows
from tiny_models import NO_DROPOUT
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastpeft as fp
from fastpeft.fused.attention import tokens as attention_tokens
from fastpeft.fused.head.pooled import FusedPooledModel, pooled_read
from fastpeft.fused.layout import LastLayout
from fastpeft.fused.stack.rows import RowsCall
from fastpeft.methods.base import FSDP
from fastpeft.registry import has_form

pytestmark = pytest.mark.usefixtures("one_thread")
BERT = TEXT | NO_DROPOUT | {"num_labels": 3}
ROBERTA = BERT | {"pad_token_id": 1}
DISTIL = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": 99, "max_position_embeddings": 64, "num_labels": 3}
DISTIL |= {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
DECODER = GROUPED | {"num_labels": 3}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99, "n_positions": 64, "pad_token_id": PAD, "num_labels": 3}
GPT2 |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
OPT = TEXT | {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0, "num_labels": 3}
IMAGES = VISION | {"num_labels": 3}

FIRST = {  # a token before the patches; a pooler; a head of its own; a projection
    "vit": lambda: T.ViTForImageClassification(T.ViTConfig(**IMAGES)),
    "deit": lambda: T.DeiTForImageClassification(T.DeiTConfig(**IMAGES)),
    "vit-msn": lambda: T.ViTMSNForImageClassification(T.ViTMSNConfig(**IMAGES)),
    "bert": lambda: T.BertForSequenceClassification(T.BertConfig(**BERT)),
    "bert-next": lambda: T.BertForNextSentencePrediction(T.BertConfig(**BERT)),
    "ernie": lambda: T.ErnieForSequenceClassification(T.ErnieConfig(**BERT)),
    "layoutlm": lambda: T.LayoutLMForSequenceClassification(T.LayoutLMConfig(**BERT)),
    "roberta": lambda: T.RobertaForSequenceClassification(T.RobertaConfig(**ROBERTA)),
    "roberta-prenorm": lambda: T.RobertaPreLayerNormForSequenceClassification(T.RobertaPreLayerNormConfig(**ROBERTA)),
    "xlm-roberta-xl": lambda: T.XLMRobertaXLForSequenceClassification(T.XLMRobertaXLConfig(**ROBERTA)),
    "xlm-roberta": lambda: T.XLMRobertaForSequenceClassification(T.XLMRobertaConfig(**ROBERTA)),
    "electra": lambda: T.ElectraForSequenceClassification(T.ElectraConfig(**BERT, embedding_size=16)),
    "distilbert": lambda: T.DistilBertForSequenceClassification(T.DistilBertConfig(**DISTIL)),
}
LAST = {
    "mistral": lambda: T.MistralForSequenceClassification(T.MistralConfig(**DECODER, sliding_window=4)),
    "qwen2": lambda: T.Qwen2ForSequenceClassification(T.Qwen2Config(**DECODER)),
    "qwen3": lambda: T.Qwen3ForSequenceClassification(T.Qwen3Config(**DECODER, head_dim=8)),
    "gemma2": lambda: T.Gemma2ForSequenceClassification(T.Gemma2Config(**DECODER, head_dim=8, query_pre_attn_scalar=8)),
    "smollm3": lambda: T.SmolLM3ForSequenceClassification(T.SmolLM3Config(**DECODER, no_rope_layers=[1, 1])),
    "phi3": lambda: T.Phi3ForSequenceClassification(T.Phi3Config(**DECODER, sliding_window=None)),
    "gpt2": lambda: T.GPT2ForSequenceClassification(T.GPT2Config(**GPT2)),
    "opt": lambda: T.OPTForSequenceClassification(T.OPTConfig(**OPT)),
    "gpt-neox": lambda: T.GPTNeoXForSequenceClassification(T.GPTNeoXConfig(**TEXT, num_labels=3, hidden_dropout=0.0)),
    "llama": lambda: T.LlamaForSequenceClassification(T.LlamaConfig(**DECODER)),
    "ministral3": lambda: T.Ministral3ForSequenceClassification(T.Ministral3Config(**DECODER, head_dim=8)),
    "modernbert decoder": lambda: T.ModernBertDecoderForSequenceClassification(T.ModernBertDecoderConfig(**DECODER)),
}
# queries come out of one projection with keys and values; or are scaled by their positions
WHOLE_ATTENTION = ("phi3", "gpt2", "gpt-neox", "ministral3", "modernbert decoder")


def tiny(name: str, dtype=torch.float64) -> nn.Module:
    return _lively((FIRST | LAST)[name](), dtype).train()


def batch_of(name: str, kind: str) -> dict:
    labels = torch.tensor([0, 1, 0])
    if name in ("vit", "deit", "vit-msn"):
        return {"pixel_values": _image(), "labels": labels}
    ids, mask = _rows(kind)
    return {"input_ids": ids, "labels": labels} | ({} if kind == "full" else {"attention_mask": mask})


@pytest.fixture
def computed(monkeypatch):
    """Of each call whose last layer computes one row of each sample: how many tokens the layers below compute, and whether its attention
    computes the queries of these rows alone."""
    seen, of, each = [], LastLayout.of_columns.__func__, attention_tokens._of_each

    def layout(cls, rows, columns, column, device, tokens=None):
        made = of(cls, rows, columns, column, device, tokens)
        seen.append([made.tokens, False])
        return made

    def queries_of_each(*args, **kwargs):
        seen[-1][1] = True
        return each(*args, **kwargs)

    monkeypatch.setattr(LastLayout, "of_columns", classmethod(layout))
    monkeypatch.setattr(attention_tokens, "_of_each", queries_of_each)
    return seen


QUICK = ["vit", "bert", "roberta", "electra", "distilbert", "mistral", "gemma2", "gpt2", "opt", "llama", "ministral3", "modernbert decoder"]


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in (*FIRST, *LAST)])
def test_the_model_as_it_was(name, computed):
    plain = tiny(name)
    model = copy.deepcopy(plain)
    assert fp.optimize(model).notes and has_form(model, FusedPooledModel)
    for kind in ("full",) if "vit" in name or name == "deit" else ("full", "padded", "left"):
        given = batch_of(name, kind) | ({"use_cache": False} if name in LAST else {})
        computed.clear()
        mine, theirs = step(model, given), step(plain, given)
        assert_same(mine, theirs, f"{name}, {kind}")
        torch.testing.assert_close(mine[0].logits, theirs[0].logits, rtol=1e-9, atol=1e-11)
        if name != "llama":  # has a driver of its own
            mask = given.get("attention_mask")
            assert computed[0][1] == (name not in WHOLE_ATTENTION)
            # every token that is attended to, and the first one, which is read wherever it is
            attended = None if mask is None else mask.bool() | (torch.arange(12) == 0 if name in FIRST else mask.bool())
            if attended is not None and name != "opt":
                assert computed[0][0] == int(attended.sum()) or kind == "left"


@pytest.mark.parametrize("name", ["bert", "mistral", "gpt2"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_evaluation_and_what_else_is_returned(name, implementation, computed):
    """The cache of a decoder is whole; logits are those of every caller, with and without a graph."""
    plain = tiny(name, torch.float32).eval()
    plain.set_attn_implementation(implementation)
    model = copy.deepcopy(plain)
    fp.optimize(model)
    given = batch_of(name, "padded")
    for context in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        computed.clear()
        with context():
            mine, theirs = model(**given), plain(**given)
        torch.testing.assert_close(mine.logits, theirs.logits)
        torch.testing.assert_close(mine.loss, theirs.loss)
        assert computed and mine.keys() == theirs.keys()
    if name != "bert":
        for ours, own in zip(mine.past_key_values.layers, theirs.past_key_values.layers):
            torch.testing.assert_close((ours.keys, ours.values), (own.keys, own.values))


def test_llama_with_its_driver(monkeypatch):
    """It is told where it is read; where a call fills a cache, which its caller may read, it computes every token."""
    from fastpeft.fused.stack import driver as stack

    plain, seen, queries_at = tiny("llama"), [], stack.queries_at
    model = copy.deepcopy(plain)
    fp.optimize(model)
    monkeypatch.setattr(stack, "queries_at", lambda *args: (seen.append(args[1]), queries_at(*args))[1])
    given = batch_of("llama", "padded")
    mine, theirs = model(**given), plain(**given)
    assert not seen and mine.past_key_values.get_seq_length() == theirs.past_key_values.get_seq_length() == 12
    assert_same(step(model, given | {"use_cache": False}), step(plain, given | {"use_cache": False}))
    assert torch.equal(seen[0], torch.nn.functional.one_hot(given["attention_mask"].sum(1) - 1, 12).bool())


def test_flops():
    """Of two layers of a tiny ViT, forward: of the last one keys, values and norms of all tokens, all else of one."""
    plain = tiny("vit", torch.float32).eval()
    model = copy.deepcopy(plain)
    fp.optimize(model)
    counts = []
    for each in (plain, model):
        with FlopCounterMode(display=False) as flops, torch.no_grad():
            each(pixel_values=_image())
        counts.append(flops.get_flop_counts()["Global"])
    linear = [sum(c for op, c in count.items() if "mm" in str(op)) for count in counts]
    B, L, C, I = 3, 5, VISION["hidden_size"], VISION["intermediate_size"]
    assert linear[0] - linear[1] == 2 * B * (L - 1) * (2 * C * C + 2 * C * I)


def test_choices_that_are_as_many_as_tokens(computed):
    """Three samples of two choices, six tokens each."""
    plain = _lively(T.BertForMultipleChoice(T.BertConfig(**BERT)), torch.float64).train()
    model = copy.deepcopy(plain)
    fp.optimize(model)
    ids, mask = (t.view(3, 2, 6) for t in _rows("padded"))
    for given in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}):
        given["labels"] = torch.tensor([0, 1, 0])
        assert_same(step(model, given), step(plain, given))
    assert len(computed) == 2


def test_adapters_and_a_head_that_peft_trains(computed):
    peft = pytest.importorskip("peft")
    for name in ("bert", "roberta", "mistral"):
        config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules="all-linear", init_lora_weights=False)
        plain = peft.get_peft_model(tiny(name), config).double().train()
        model = copy.deepcopy(plain)
        fp.optimize(model)
        computed.clear()
        given = batch_of(name, "padded")
        assert_same(step(model, given), step(plain, given))
        assert computed, name
        assert fp.restore(model) == []
        assert_same(step(model, given), step(plain, given))


@pytest.mark.parametrize("name", ["bert", "mistral"])
def test_two_threads(name, monkeypatch, computed):
    """One model, called while another thread runs it: that call computes every token, by the modules as they are."""
    plain = tiny(name).eval()
    model = copy.deepcopy(plain)
    fp.optimize(model)
    given, other, seen = batch_of(name, "padded"), batch_of(name, "full"), []
    begin = RowsCall.begin

    def begun(self, *args):
        thread = threading.Thread(target=lambda: seen.append(model(**other).logits))
        begin(self, *args)
        thread.start()
        thread.join()

    monkeypatch.setattr(RowsCall, "begin", begun)
    with torch.no_grad():
        theirs = plain(**given).logits
        torch.testing.assert_close(model(**given).logits, theirs)
        torch.testing.assert_close(seen[0], plain(**other).logits)
        monkeypatch.setattr(RowsCall, "begin", begin)
        assert len(computed) == 1 and model(**given).logits.shape == theirs.shape
    stack = pooled_read(model).stack
    assert not {"layer", "layers", "score"} & (stack.__dict__.keys() | model.__dict__.keys())


OTHERS = {
    "embeddings": lambda m, given: {"inputs_embeds": m.get_input_embeddings()(given["input_ids"])},
    "position_ids": lambda m, given: {"position_ids": torch.arange(12).expand(3, -1).flip(1)},
    "token types": lambda m, given: {"token_type_ids": (given["input_ids"] > 50).long()},
    "a mask of queries": lambda m, given: {"attention_mask": torch.ones(3, 1, 12, 12).tril().bool()},
    "no token of the first": lambda m, given: {"attention_mask": 1 - torch.eye(12)[:1].long().expand(3, -1)},
}


@pytest.mark.parametrize("name,what", [(n, w) for n in ("bert", "mistral") for w in OTHERS if n == "bert" or w != "token types"])
def test_other_arguments(name, what):
    plain = tiny(name)
    model = copy.deepcopy(plain)
    fp.optimize(model)
    given = batch_of(name, "full")
    given |= OTHERS[what](plain, given)
    if "inputs_embeds" in given:
        del given["input_ids"]
        given["inputs_embeds"] = given["inputs_embeds"].detach()
    assert_same(step(model, given), step(plain, given))


def test_images_of_another_size(computed):
    plain = tiny("vit")
    model = copy.deepcopy(plain)
    fp.optimize(model)
    given = {"pixel_values": _image(size=24), "labels": torch.tensor([0, 1, 0]), "interpolate_pos_encoding": True}
    assert_same(step(model, given), step(plain, given))
    assert computed == [[3 * 10, True]]


def test_no_padding_token():
    """The model's own error for several samples; one sample is read at its end."""
    config = T.Qwen2Config(**DECODER | {"pad_token_id": None})
    plain = _lively(T.Qwen2ForSequenceClassification(config), torch.float64).train()
    model = copy.deepcopy(plain)
    fp.optimize(model)
    ids = _rows("full")[0]
    with pytest.raises(ValueError, match="no padding token"):
        model(input_ids=ids)
    given = {"input_ids": ids[:1], "labels": torch.tensor([1])}
    assert_same(step(model, given), step(plain, given))


def _hooked(pick):
    def change(model, heard):
        pick(model).register_forward_hook(lambda module, args, output: heard.append(args[0].shape))

    return change


def _checkpointed(model, heard):
    model.gradient_checkpointing_enable({"use_reentrant": False})


KEEPS = {
    "a hook in the last layer": _hooked(lambda m: m.bert.encoder.layer[-1].output.dense),
    "a hook on the encoder": _hooked(lambda m: m.bert.encoder),
    "a hook on the pooler": _hooked(lambda m: m.bert.pooler),
    "checkpoints": _checkpointed,
    "chunks": lambda m, heard: [setattr(layer, "chunk_size_feed_forward", 3) for layer in m.bert.encoder.layer],
    "hidden states": lambda m, heard: setattr(m.config, "output_hidden_states", True),
    "attentions": lambda m, heard: setattr(m.config, "output_attentions", True),
}


@pytest.mark.parametrize("why", KEEPS)
def test_what_keeps_every_token(why, computed):
    plain = tiny("bert", torch.float32)
    if why == "attentions":
        plain.set_attn_implementation("eager")
    model = copy.deepcopy(plain)
    fp.optimize(model)
    given, heard, outputs = batch_of("bert", "padded"), [], []
    for each in (plain, model):
        KEEPS[why](each, heard)
        outputs.append(each(**given))
        outputs[-1].loss.backward()
    assert not computed and len(set(heard)) <= 1
    torch.testing.assert_close(outputs[1].logits, outputs[0].logits)
    for a, b in zip(outputs[1].hidden_states or (), outputs[0].hidden_states or ()):
        torch.testing.assert_close(a, b)
    for a, b in zip(plain.parameters(), model.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("where", ["layer", "attention"])
def test_fsdp_gathers_weights_where_a_module_is_called(where, computed):
    """Its hooks see no values, but nothing else may run in place of the module's call: that would compute with a shard."""
    plain = tiny("bert")
    model, called = copy.deepcopy(plain), []
    fp.optimize(model)
    last = model.bert.encoder.layer[-1]

    def gather(module, args):
        called.append(module)

    gather.__module__ = FSDP
    (last if where == "layer" else last.attention.self).register_forward_pre_hook(gather)
    given = batch_of("bert", "padded")
    assert_same(step(model, given), step(plain, given))
    assert len(called) == 1 and bool(computed) == (where == "attention")


def test_a_loss_of_ones_own_may_read_every_logit(computed):
    plain = tiny("qwen2")
    model, seen = copy.deepcopy(plain), []
    fp.optimize(model)
    model.loss_function = lambda logits, labels, pooled_logits, config: (seen.append(logits.detach()), logits.sum())[1]
    given = batch_of("qwen2", "padded")
    model(**given)
    want = plain.score(plain.model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).last_hidden_state)
    torch.testing.assert_close(seen[0], want, rtol=1e-5, atol=1e-5)  # some of it in float32
    assert not computed


def test_models_that_read_more():
    """The mean of the patches beside the first token, every token, or hidden states that a caller gets."""
    for model in (
        T.Dinov2ForImageClassification(T.Dinov2Config(**IMAGES)),
        T.BertForTokenClassification(T.BertConfig(**BERT)),
        T.BertForQuestionAnswering(T.BertConfig(**BERT)),
        T.SiglipForImageClassification(T.SiglipConfig(vision_config=VISION, text_config=TEXT)),
        T.CLIPTextModelWithProjection(T.CLIPTextConfig(**TEXT)),
        T.BertModel(T.BertConfig(**BERT)),
        T.MistralForTokenClassification(T.MistralConfig(**DECODER)),
    ):
        assert pooled_read(model) is None, type(model).__name__
