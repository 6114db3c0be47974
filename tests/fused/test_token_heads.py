"""Token classifiers and masked language models in training steps whose logits nobody reads: losses, gradients, and what is computed."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as T
from double import assert_same, step
from tiny_batches import GROUPED, PAD, TEXT, _lively, _rows
from tiny_models import NO_DROPOUT
from torch import nn

import fastpeft as fp
from fastpeft.cost.profile import measure
from fastpeft.fused.head import token_heads
from fastpeft.fused.head.token_classifiers import FusedTokenClassifier
from fastpeft.fused.head.token_heads import token_head, token_path
from fastpeft.fused.layout import LastLayout
from fastpeft.registry import has_form

pytestmark = pytest.mark.usefixtures("one_thread")
BERT = TEXT | NO_DROPOUT | {"num_labels": 3}
ROBERTA = BERT | {"pad_token_id": 1}
DISTIL = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": 99, "max_position_embeddings": 64, "num_labels": 3}
DISTIL |= {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
DECODER = GROUPED | {"num_labels": 3, "classifier_dropout": 0.0}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99, "n_positions": 64, "pad_token_id": PAD, "num_labels": 3}
GPT2 |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "classifier_dropout": 0.0}
ELECTRA = BERT | {"embedding_size": 16}

CLASSIFIERS = {
    "bert": lambda: T.BertForTokenClassification(T.BertConfig(**BERT)),
    "roberta": lambda: T.RobertaForTokenClassification(T.RobertaConfig(**ROBERTA)),
    "electra": lambda: T.ElectraForTokenClassification(T.ElectraConfig(**ELECTRA)),
    "distilbert": lambda: T.DistilBertForTokenClassification(T.DistilBertConfig(**DISTIL)),
    "gpt2": lambda: T.GPT2ForTokenClassification(T.GPT2Config(**GPT2)),
    "mistral": lambda: T.MistralForTokenClassification(T.MistralConfig(**DECODER, sliding_window=4)),
    "qwen3": lambda: T.Qwen3ForTokenClassification(T.Qwen3Config(**DECODER, head_dim=8)),
    "llama": lambda: T.LlamaForTokenClassification(T.LlamaConfig(**DECODER)),
}
MASKED = {
    "bert-lm": lambda: T.BertForMaskedLM(T.BertConfig(**BERT)),
    "roberta-lm": lambda: T.RobertaForMaskedLM(T.RobertaConfig(**ROBERTA)),
    "electra-lm": lambda: T.ElectraForMaskedLM(T.ElectraConfig(**ELECTRA)),
    "distilbert-lm": lambda: T.DistilBertForMaskedLM(T.DistilBertConfig(**DISTIL)),
}
QUICK = ["bert", "mistral", "llama", "distilbert-lm"]
SLOW = pytest.mark.slow
NAMES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in (*CLASSIFIERS, *MASKED)]


def tiny(name: str, dtype=torch.float64) -> nn.Module:
    return _lively((CLASSIFIERS | MASKED)[name](), dtype).train()


def batch_of(name: str, kind: str) -> dict:
    """A third of the real tokens have a label, and one token of padding."""
    ids, mask = _rows("full" if kind == "both" else kind)
    if kind == "both":
        mask[1, :2] = mask[1, 9:] = mask[2, :1] = 0
    generator = torch.Generator().manual_seed(4)
    labels = torch.randint(0, 3, ids.shape, generator=generator).masked_fill(torch.rand(ids.shape, generator=generator) > 0.3, -100)
    if kind == "padded":
        labels[2, -1] = 1
    elif kind != "full":
        labels = labels.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "labels": labels} | ({} if kind == "full" else {"attention_mask": mask})


def pair(name: str, dtype=torch.float64, change=None) -> tuple[nn.Module, nn.Module]:
    plain = tiny(name, dtype)
    if change is not None:
        plain = change(plain) or plain
    fused = copy.deepcopy(plain)
    fp.optimize(fused, lean_logits=True)
    return plain, fused


@pytest.fixture
def computed(monkeypatch):
    """(tokens of the last layer, rows behind its attention) of each call that leaves some out."""
    seen, of = [], LastLayout.of.__func__

    def layout(cls, *args):
        made = of(cls, *args)
        seen.append((made.tokens, len(made.read)))
        return made

    monkeypatch.setattr(LastLayout, "of", classmethod(layout))
    return seen


@pytest.mark.parametrize("name", NAMES)
def test_the_model_as_it_was(name, computed):
    plain, fused = pair(name)
    assert has_form(fused, FusedTokenClassifier) == (name in CLASSIFIERS)
    for kind in ("full", "padded", "left", "both"):
        given = batch_of(name, kind)
        computed.clear()
        mine = step(fused, given)
        assert_same(mine, step(plain, given), f"{name}, {kind}")
        assert mine[0].logits is None
        if name != "llama":  # has a driver of its own
            labelled = given["labels"] != -100
            attended = given.get("attention_mask", torch.ones_like(given["labels"])).bool() | labelled
            assert computed[0][1] == int(labelled.sum()), kind
            # of what is left of a causal sample, or beyond its window, a token attends to nothing: all are computed then
            assert computed[0][0] == int(attended.sum()) or (computed[0][0] == 36 and name in ("mistral", "gpt2", "qwen3"))
    assert fp.restore(fused) == []
    assert_same(step(fused, given), step(plain, given))


@pytest.mark.parametrize("name", ["bert-lm", "mistral", pytest.param("bert", marks=SLOW)])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_what_else_is_asked(name, implementation, computed):
    """Evaluation, a step without labels, hidden states, tuples, and a model that was not told that nobody reads: as the model has them."""
    plain = tiny(name, torch.float32)
    plain.set_attn_implementation(implementation)
    fused, bare = copy.deepcopy(plain), copy.deepcopy(plain)
    fp.optimize(fused, lean_logits=True)
    fp.optimize(bare)
    given = batch_of(name, "padded")
    unlabelled = {name: value for name, value in given.items() if name != "labels"}
    for model, call in ((bare, given), (fused, unlabelled), (fused, given | {"return_dict": False})):
        mine, theirs = model(**call), plain(**call)
        assert len(mine) == len(theirs)
        for a, b in zip(mine, theirs if isinstance(theirs, tuple) else theirs.values()) if isinstance(mine, tuple) else ():
            torch.testing.assert_close(a, b)
        if not isinstance(mine, tuple):
            torch.testing.assert_close(mine.logits, theirs.logits)
    mine, theirs = fused(**given, output_hidden_states=True), plain(**given, output_hidden_states=True)
    for a, b in zip(mine.hidden_states, theirs.hidden_states, strict=True):
        torch.testing.assert_close(a, b)
    fused.eval(), plain.eval()
    torch.testing.assert_close(fused(**given).logits, plain(**given).logits)
    assert not computed
    assert_same(step(fused.double().train(), given), step(plain.double().train(), given))
    assert computed


def _adapted(method: str):
    def change(model):
        peft = pytest.importorskip("peft")
        if method == "lora":
            config = peft.LoraConfig(task_type="TOKEN_CLS", r=2, target_modules=["query", "value", "dense"], init_lora_weights=False)
        else:
            config = peft.IA3Config(task_type="TOKEN_CLS", target_modules=["key", "value"], feedforward_modules=[])
        return peft.get_peft_model(model, config).double().train()

    return change


def _checkpoints(model):
    model.gradient_checkpointing_enable({"use_reentrant": False})


def _hook(model):
    model.bert.encoder.layer[-1].output.register_forward_hook(lambda module, args, output: None)


def _hook_on_head(model):
    model.classifier.register_forward_hook(lambda module, args, output: None)


@pytest.mark.parametrize(
    "name,change,leaves_out",
    [
        ("bert", _adapted("lora"), True),
        pytest.param("bert", _adapted("ia3"), True, marks=SLOW),
        ("bert", _checkpoints, False),
        ("bert", _hook, False),
        ("bert", _hook_on_head, False),
    ],
)
def test_with_others(name, change, leaves_out, computed):
    plain, fused = pair(name, change=change)
    given = batch_of(name, "padded")
    mine, theirs = step(fused, given), step(plain, given)
    assert_same(mine, theirs)
    assert bool(computed) == leaves_out
    if not leaves_out:
        torch.testing.assert_close(mine[0].logits, theirs[0].logits)


OTHERS = {
    "embeddings": lambda m, given: {"inputs_embeds": m.get_input_embeddings()(given.pop("input_ids")).detach()},
    "a mask of queries": lambda m, given: {"attention_mask": torch.ones(3, 1, 12, 12).tril().bool()},
    "positions that start again": lambda m, given: {"position_ids": torch.arange(12).remainder(5).expand(3, -1)},
    "every token labelled": lambda m, given: {"labels": given["labels"].clamp(min=0)},
    "no token labelled but one": lambda m, given: {"labels": torch.full((3, 12), -100).index_fill_(1, torch.tensor([5]), 2)},
}


@pytest.mark.parametrize("name", ["bert", "llama", *(pytest.param(name, marks=SLOW) for name in ("bert-lm", "mistral"))])
@pytest.mark.parametrize("what", OTHERS)
def test_other_arguments(name, what):
    plain, fused = pair(name)
    given = batch_of(name, "full")
    given |= OTHERS[what](plain, given)
    assert_same(step(fused, given), step(plain, given))


def test_no_label_at_all():
    """The mean of nothing, as PyTorch has it."""
    plain, fused = pair("bert")
    given = batch_of("bert", "padded")
    given["labels"] = torch.full_like(given["labels"], -100)
    assert fused(**given).loss.isnan() and plain(**given).loss.isnan()


def test_flops():
    """Linear layers: the first of two layers sees real tokens, of the second what follows its attention the labelled ones, and the head."""
    plain, fused = pair("bert", torch.float32)
    given, C, I = batch_of("bert", "padded"), TEXT["hidden_size"], TEXT["intermediate_size"]
    counts = []
    for model in (plain, fused):
        with measure(model) as cost, torch.no_grad():
            model(**given)
        counts.append(cost.flops)
    labelled = given["labels"] != -100
    tokens, rows, T_ = 36, int(labelled.sum()), int((labelled | given["attention_mask"].bool()).sum())
    first, keys, behind = 2 * C * (4 * C + 2 * I), 2 * C * 3 * C, 2 * C * (C + 2 * I)
    assert counts[0] - counts[1] == (tokens - T_) * (first + keys) + (tokens - rows) * (behind + 2 * C * 3)


def test_models_that_read_more():
    """Every token in a softmax over positions, a row of each sample, or a loss of another kind."""
    for cls in (T.BertForQuestionAnswering, T.BertForSequenceClassification, T.BertLMHeadModel, T.LlamaForCausalLM, T.BertForPreTraining):
        assert token_head(cls) is None or token_path(cls(T.BertConfig(**BERT))) is None, cls
    plain = tiny("distilbert-lm")
    assert token_path(plain) is not None
    plain.mlm_loss_fct = nn.CrossEntropyLoss(weight=torch.ones(99))
    assert token_path(plain) is None


class Shifted(nn.Module):
    def forward(self, x, labels=None):
        outputs = self.bert(x)
        logits = self.classifier(outputs[0])
        loss_fct = nn.CrossEntropyLoss()
        loss = loss_fct(logits.view(-1, 3), labels[:, 1:].view(-1))
        return T.modeling_outputs.TokenClassifierOutput(loss=loss, logits=logits)


class Smoothed(nn.Module):
    def forward(self, x, labels=None):
        outputs = self.bert(x)
        logits = self.classifier(outputs[0])
        loss_fct = nn.CrossEntropyLoss(label_smoothing=0.1)
        loss = loss_fct(logits.view(-1, 3), labels.view(-1))
        return T.modeling_outputs.TokenClassifierOutput(loss=loss, logits=logits)


class HandsStatesOut(nn.Module):
    def forward(self, x, labels=None):
        outputs = self.bert(x)
        state = outputs[0]
        logits = self.classifier(state)
        loss_fct = nn.CrossEntropyLoss()
        loss = loss_fct(logits.view(-1, 3), labels.view(-1))
        return T.modeling_outputs.TokenClassifierOutput(loss=loss, logits=logits, hidden_states=state)


class Means(nn.Module):
    def forward(self, x, labels=None):
        outputs = self.bert(x)
        logits = self.classifier(outputs[0])
        logits = logits - logits.mean(1, keepdim=True)
        loss_fct = nn.CrossEntropyLoss()
        loss = loss_fct(logits.view(-1, 3), labels.view(-1))
        return T.modeling_outputs.TokenClassifierOutput(loss=loss, logits=logits)


class Good(nn.Module):
    def forward(self, x, labels=None):
        outputs = self.bert(x)
        logits = self.classifier(self.dropout(outputs[0]))
        loss_fct = nn.CrossEntropyLoss()
        loss = loss_fct(logits.view(-1, 3), labels.view(-1))
        return T.modeling_outputs.TokenClassifierOutput(loss=loss, logits=logits)


def test_what_is_found_in_code():
    assert token_head(Good) == token_heads.TokenHead("bert", frozenset(("dropout", "classifier")), frozenset())
    for cls in (Shifted, Smoothed, HandsStatesOut, Means):
        assert token_head(cls) is None, cls


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
def test_what_is_called_output_embeddings_may_make_no_logits(act, lean):
    """DeBERTa with ``legacy=False`` names the layer before its logits, whose output an activation of ours reads."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 99}
    config = T.DebertaV2Config(**sizes, hidden_act=act, legacy=False, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    plain = T.DebertaV2ForMaskedLM(config).train()
    model = copy.deepcopy(plain)
    fp.optimize(model, lean_logits=lean)
    batch = {"input_ids": torch.tensor([[34, 41, 88], [64, 43, 96]]), "labels": torch.tensor([[34, 41, 88], [64, -100, -100]])}
    for each in (plain, model):
        each(**batch).loss.backward()
    for (name, p), q in zip(plain.named_parameters(), model.parameters()):
        torch.testing.assert_close(q.grad, p.grad, atol=1e-6, rtol=1e-4, msg=name)
