"""Any language model of transformers: its own forward and loss, logits at labelled positions only, against the same model as it was."""

import copy
import inspect
import pickle

import pytest
import tiny_models
import torch
import transformers as T
from tiny_models import DECODERS, GROUPED, NO_DROPOUT, TEXT, VISION_LANGUAGE, V, kinds, tiny
from transformers.loss.loss_utils import ForCausalLMLoss

import fastpeft as fp
from fastpeft.fused.head import lazy_logits
from fastpeft.fused.head.lazy_logits import LazyLogits
from fastpeft.fused.head.outputs import is_deferred

BART = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "dropout": 0.0}
BART |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": V, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1}
BART |= {"eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2}
MASKED = {**TEXT, **NO_DROPOUT}
EXPERTS = {**GROUPED, "num_local_experts": 2, "num_experts_per_tok": 1, "router_jitter_noise": 0.0, "output_router_logits": True}
MORE = {  # what models do between head and loss: a scale, a division, a bias, an auxiliary loss, labels at their own positions
    "cohere": lambda: T.CohereForCausalLM(T.CohereConfig(**GROUPED, logit_scale=0.3)),
    "granite": lambda: T.GraniteForCausalLM(T.GraniteConfig(**GROUPED, logits_scaling=3.0)),
    "bart": lambda: T.BartForConditionalGeneration(T.BartConfig(**BART)),
    "mixtral": lambda: T.MixtralForCausalLM(T.MixtralConfig(**EXPERTS)),
    "bert-mlm": lambda: T.BertForMaskedLM(T.BertConfig(**MASKED)),
    "roberta-mlm": lambda: T.RobertaForMaskedLM(T.RobertaConfig(**MASKED)),
    "modernbert-mlm": lambda: T.ModernBertForMaskedLM(T.ModernBertConfig(**{**TEXT, "num_attention_heads": 2}, attention_dropout=0.0)),
}
EXACT = [*DECODERS, "t5", "whisper", *VISION_LANGUAGE, *MORE]
QUICK = ["mistral", "gemma2", "gpt2", "t5", "qwen3-vl", "blip2", "florence2", *MORE]  # each a way of its own from head to loss


@pytest.fixture(autouse=True)
def double(monkeypatch):
    """transformers' losses, norms and rotary tables in float64 instead of float32."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def make(name):
    if name not in MORE:
        return tiny(name)
    torch.manual_seed(0)
    model = MORE[name]()
    if hasattr(model, "set_experts_implementation") and name == "mixtral":
        model.set_experts_implementation("eager")
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    return tiny_models._lively(model, torch.float64), lambda kind: tiny_models._causal_batch(kind)


def both(name="mistral", **options):
    plain, batch = make(name)
    model = copy.deepcopy(plain)
    fp.optimize(model, lambda module, where: where == "", **options)
    return plain.train(), model.train(), batch


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(plain, model, batch):
    torch.manual_seed(0)
    want = plain(**batch)
    torch.manual_seed(0)
    got = model(**batch)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-12, atol=1e-12, equal_nan=True)
    theirs, ours = gradients(plain, want.loss), gradients(model, got.loss)
    assert theirs.keys() == ours.keys()
    for name, grad in theirs.items():
        torch.testing.assert_close(
            ours[name], grad, rtol=1e-9, atol=1e-11 * (1 + float(grad.abs().max())), msg=lambda m, n=name: f"{n}: {m}"
        )
    return got, want


@pytest.fixture
def no_logits(monkeypatch):
    """A loss that reads logits fails, and each loss that forms none counts."""
    count, fused = [], lazy_logits._fused_loss

    def read(self):
        raise AssertionError("logits were computed")

    monkeypatch.setattr(LazyLogits, "read", read)
    monkeypatch.setattr(lazy_logits, "_fused_loss", lambda *args: (count.append(1), fused(*args))[1])
    return count


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in EXACT if n != "llama"])
def test_the_model_as_it_was(name, no_logits):
    plain, model, batch = both(name, lean_logits=True)
    for kind in kinds(name) if name not in MORE else ("full", "padded", "left"):
        got, _ = assert_same_step(plain, model, batch(kind))
        assert got.logits is None and "logits" not in got
        assert no_logits.pop() and not no_logits, kind


def test_logits_that_somebody_reads():
    plain, model, batch = both("gemma2")
    model.get_output_embeddings().requires_grad_(False)  # a trained head changes before they may be read
    plain.get_output_embeddings().requires_grad_(False)
    got, want = assert_same_step(plain, model, batch("full"))
    assert is_deferred(got) and list(got) == list(want) and type(got).__name__ == type(want).__name__
    torch.testing.assert_close(got.logits, want.logits, rtol=0, atol=0)
    assert type(got.logits) is torch.Tensor and not is_deferred(got)
    torch.testing.assert_close(model(**batch("full"))[1].argmax(-1), want.logits.argmax(-1))
    _, logits, *_ = model(**batch("full"), return_dict=False)
    torch.testing.assert_close(logits, want.logits, rtol=0, atol=0)
    again = pickle.loads(pickle.dumps(model(**batch("full"))))
    torch.testing.assert_close(again.logits, want.logits, rtol=0, atol=0)


def test_a_trained_head_leaves_the_step_as_it_was():
    _, model, batch = both()
    output = model(**batch("full"))
    assert not is_deferred(output) and type(output.logits) is torch.Tensor and output.logits.grad_fn is not None


def ids(model):
    return {"input_ids": torch.randint(3, V, (2, 7), generator=torch.Generator().manual_seed(0))}


LABELS = torch.tensor([[-100, 5, 6, -100, 8, 9, 10], [-100, -100, 3, 3, -100, -100, -100]])


@pytest.mark.parametrize(
    "options",
    [
        {"labels": LABELS, "num_items_in_batch": 11},
        {"labels": LABELS, "num_items_in_batch": torch.tensor(11)},
        {"labels": LABELS.clamp(min=3), "ignore_index": 3},
        {"labels": LABELS, "shift_labels": LABELS.roll(2, 1)},
        {"labels": torch.full_like(LABELS, -100)},
        {"labels": LABELS, "attention_mask": torch.tensor([[1] * 7, [1, 1, 1, 0, 0, 0, 0]])},  # labels on padding
        {"labels": LABELS[:, -3:], "logits_to_keep": 3},
        {"labels": LABELS, "shift_labels": LABELS[LABELS > 0], "logits_to_keep": LABELS > 0},
        {"labels": LABELS, "return_dict": True, "output_hidden_states": True},
    ],
    ids=["items", "items tensor", "ignore_index", "shifted", "none labelled", "on padding", "kept", "kept by mask", "hidden states"],
)
@pytest.mark.parametrize("lean", [True, False])
def test_options_of_the_loss(options, lean, no_logits):
    plain, model, _ = both(lean_logits=lean)
    for each in (plain, model):
        each.lm_head.requires_grad_(False)
    got, want = assert_same_step(plain, model, ids(model) | options)
    assert len(no_logits) == 1 and (got.logits is None if lean else is_deferred(got))
    if "output_hidden_states" in options:
        torch.testing.assert_close(got.hidden_states, want.hidden_states)


@pytest.mark.parametrize("name", ["mistral", "gpt2"])
def test_a_tuple_has_its_logits(name):
    """And those of positions without a label are right: who reads a part of a tuple knows it by its place."""
    plain, model, batch = both(name, lean_logits=True)
    given = batch("padded") | {"return_dict": False, "use_cache": False}
    (loss, logits), (want, wanted) = model(**given), plain(**given)
    torch.testing.assert_close(logits, wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=1e-12)


def test_labels_by_position():
    """T5's and GPT-2's callers may name no argument."""
    plain, model, _ = both("gpt2", lean_logits=True)
    at = list(inspect.signature(plain.forward).parameters).index("labels")
    args = [ids(model)["input_ids"], *[None] * (at - 1), LABELS]
    torch.testing.assert_close(model(*args).loss, plain(*args).loss, rtol=1e-12, atol=1e-12)
    assert model(*args).logits is None


@pytest.mark.parametrize(
    "how", ["evaluation", "no labels", "hook on the head", "forward of the head", "loss set later", "compiling", "functorch"]
)
def test_calls_that_stay_the_models_own(how, monkeypatch):
    plain, model, batch = both(lean_logits=True)
    given = batch("full")
    if how == "evaluation":
        model.eval()
    elif how == "no labels":
        given.pop("labels")
    elif how == "hook on the head":
        model.lm_head.register_forward_hook(lambda module, args, output: output * 2)
    elif how == "forward of the head":
        own = model.lm_head.forward
        model.lm_head.forward = lambda x: own(x) * 2
    elif how == "loss set later":
        model.loss_function = lambda logits, labels, vocab_size, **_: logits.square().mean()
    elif how == "compiling":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    else:
        monkeypatch.setattr("fastpeft.fused.head.any_head.get_interpreter_stack", lambda: [object()])
    got, want = model(**given), plain(**given)
    factor = 2 if "head" in how else 1
    assert type(got.logits) is torch.Tensor
    torch.testing.assert_close(got.logits, factor * want.logits)
    if how == "loss set later":
        torch.testing.assert_close(got.loss, want.logits.square().mean())


@pytest.mark.parametrize("kind", ["LoRA", "modules_to_save"])
def test_an_adapter_on_the_head(kind):
    peft = pytest.importorskip("peft")
    options = (
        {"target_modules": ["q_proj", "lm_head"]} if kind == "LoRA" else {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    )
    base, batch = make("granite")
    plain = peft.get_peft_model(base, peft.LoraConfig(r=2, **options)).double().train()
    for name, p in plain.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    model = copy.deepcopy(plain)
    fp.optimize(model, lambda module, where: isinstance(module, T.GraniteForCausalLM), lean_logits=True)
    got, _ = assert_same_step(plain, model, batch("padded"))
    assert got.logits is None or kind == "modules_to_save"


def test_what_stays(tmp_path):
    """The head is as it was after each step, and after one that fails; copies, pickles, saving and restore."""
    plain, model, batch = both(lean_logits=True)
    model(**batch("full"))
    assert "forward" not in model.lm_head.__dict__ and type(model.lm_head) is torch.nn.Linear
    with pytest.raises(IndexError):
        model(input_ids=ids(model)["input_ids"], labels=LABELS.clamp(min=V))
    assert "forward" not in model.lm_head.__dict__
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(**batch("full")).loss, plain(**batch("full")).loss)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(T.AutoModelForCausalLM.from_pretrained(tmp_path).double().state_dict(), plain.state_dict())
    fp.restore(model)
    assert type(model) is type(plain) and model(**batch("full")).logits is not None


def test_two_threads_and_two_heads():
    """While one thread trains, another's call of the same head gets tensors."""
    import threading

    head, seen = torch.nn.Linear(4, 9), {}
    inside, done = threading.Event(), threading.Event()

    def train():
        with lazy_logits.lazy_head(head):
            seen["trains"] = head(torch.zeros(2, 4))
            inside.set()
            done.wait()

    thread = threading.Thread(target=train)
    thread.start()
    inside.wait()
    seen["other"] = head(torch.zeros(2, 4))
    with lazy_logits.lazy_head(head):
        seen["both"] = head(torch.zeros(2, 4))
        done.set()
        thread.join()
        seen["after"] = head(torch.zeros(2, 4))
    assert {name: type(value) for name, value in seen.items()} == {
        "trains": LazyLogits, "other": torch.Tensor, "both": LazyLogits, "after": LazyLogits,
    }  # fmt: skip
    assert "forward" not in head.__dict__


def lazy(hidden, head):
    with lazy_logits.lazy_head(head):
        return head(hidden)


LAZY = {  # what models do that stays lazy
    "float": lambda z: z.float(),
    "to dtype": lambda z: z.to(torch.float64),
    "to device": lambda z: z.to(z.device),
    "to other": lambda z: z.to(torch.zeros(1, dtype=torch.float64)),
    "view": lambda z: z.view(-1, z.size(-1)),
    "view as list": lambda z: z.view([6, z.shape[2]]),
    "reshape": lambda z: torch.reshape(z, (-1, 9)),
    "flatten": lambda z: z.flatten(0, 1),
    "shift": lambda z: z[..., :-1, :].contiguous(),
    "columns": lambda z: z[:, -2:],
    "one row": lambda z: z[1],
    "mask": lambda z: z[torch.tensor([[True, False, True], [False, False, True]])],
    "rows by index": lambda z: z[:, torch.tensor([2, 0])],
    "scale": lambda z: z * 0.3,
    "scaled": lambda z: 3 * z / torch.tensor(7.0, dtype=torch.float64),
    "cap": lambda z: torch.tanh(z / 2.5) * 2.5,
    "bias": lambda z: z + torch.arange(9.0, dtype=torch.float64)[None],
    "bias and scale": lambda z: (z + torch.arange(9.0, dtype=torch.float64)) / 4,
    "uneven cap": lambda z: torch.tanh(z / 2.5) * 1.5,
    "capped twice": lambda z: torch.tanh(torch.tanh(z / 2) * 2),
    "bias on a cap": lambda z: z.tanh() + torch.arange(9.0, dtype=torch.float64),
}
READ = {  # and what needs values
    "halves": lambda z: z[..., ::2].repeat(1, 1, 2)[..., :9],
    "one class": lambda z: z[..., 4],
    "new axis": lambda z: z[None],
    "softmax": lambda z: z.softmax(-1),
    "transpose": lambda z: z.transpose(0, 1),
    "other view": lambda z: z.view(2, 27),
    "half": lambda z: z.to(torch.float16),
    "trained scale": lambda z: z * torch.ones((), dtype=torch.float64, requires_grad=True),
    "rows": lambda z: z * torch.arange(3.0, dtype=torch.float64)[:, None],
    "bias by row": lambda z: z + torch.arange(3.0, dtype=torch.float64)[:, None],
    "masked": lambda z: z.masked_fill(torch.arange(9) == 2, -1e9),
    "two": lambda z: torch.cat([z, z]),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("what", [*LAZY, *READ])
def test_what_models_do_to_logits(what, bias):
    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(4, 9, bias=bias).double(), torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    func = (LAZY | READ)[what]
    got, want = func(lazy(hidden, head)), func(head(hidden))
    assert type(got) is (LazyLogits if what in LAZY else torch.Tensor)
    assert (got.shape, got.dtype, got.device, got.dim(), len(got)) == (want.shape, want.dtype, want.device, want.dim(), len(want))
    if what in LAZY:
        labels = torch.randint(0, 9, want.shape[:-1])
        labels.view(-1)[0] = -100
        for options in ({}, {"reduction": "sum", "label_smoothing": 0.1}, {"reduction": "none"}):
            args = [(x.reshape(-1, 9), labels.reshape(-1)) for x in (func(lazy(hidden, head)), want)]
            mine, theirs = (torch.nn.functional.cross_entropy(*each, **options) for each in args)
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)
            leaves = [hidden, *head.parameters()]
            a, b = (torch.autograd.grad(x.square().sum(), leaves, retain_graph=True) for x in (mine, theirs))
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        got = got.read()
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert got.grad_fn is not None


def test_logits_changed_in_place():
    """Chameleon forbids image tokens by writing into its logits; what was lazy before sees that too."""
    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(4, 9).double(), torch.randn(2, 3, 4, dtype=torch.float64)
    losses = []
    for logits in (lazy(hidden, head), head(hidden)):
        rows = logits.view(-1, 9)
        logits[:, :, 2] = -1e9
        losses.append(torch.nn.functional.cross_entropy(rows, torch.tensor([0, 1, -100, 4, 5, 3])))
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)


@pytest.mark.parametrize("bad", ["weight", "soft targets", "shapes", "int32"])
def test_losses_that_take_logits(bad):
    """Class weights, probabilities, and errors that are PyTorch's."""
    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(4, 9).double(), torch.randn(6, 4, dtype=torch.float64)
    target, options = torch.tensor([0, 1, -100, 4, 5, 3]), {}
    if bad == "weight":
        options["weight"] = torch.rand(9, dtype=torch.float64)
    elif bad == "soft targets":
        target = torch.rand(6, 9, dtype=torch.float64)
    else:
        target = target[:4] if bad == "shapes" else target.int()
    results = []
    for logits in (lazy(hidden, head), head(hidden)):
        try:
            results.append(float(torch.nn.functional.cross_entropy(logits, target, **options).detach()))
        except (ValueError, RuntimeError) as error:
            results.append(str(error))
    assert results[0] == results[1]


def test_autocast():
    """bfloat16 products, a float32 loss, as without us; gradients no further from float64's than those without us."""
    plain, model, batch = both("mistral", lean_logits=True)
    truth = gradients(plain, plain(**batch("full")).loss)
    plain.float(), model.float()
    for module in (plain, model):
        for p in module.parameters():
            p.data = p.data.to(torch.float32)
    results = []
    for each in (plain, model):
        with torch.autocast("cpu", torch.bfloat16):
            loss = each(**batch("full")).loss
        grads = gradients(each, loss)
        results.append((loss, max(float((grads[n].double() - g).norm() / g.norm()) for n, g in truth.items())))
    (want, worst), (got, ours) = results
    assert got.dtype == want.dtype and abs(float(got) - float(want)) < 0.02 * float(want) and ours <= 1.1 * worst


def test_saved_bytes():
    """With a frozen head nothing of the vocabulary's width is kept for backward."""
    plain, model, batch = both("gemma2", lean_logits=True)
    for each in (plain, model):
        each.get_output_embeddings().requires_grad_(False)
    kept = {}
    for name, each in (("plain", plain), ("ours", model)):
        sizes = kept.setdefault(name, [])
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: (s.append(t.shape), t)[1], lambda t: t):
            each(**batch("full"))

    def wide(shapes):
        return [shape for shape in shapes if shape[-1:] == (V,)]

    assert len(wide(kept["plain"])) >= 2 and not wide(kept["ours"])


def test_a_loss_by_name_is_known():
    _, model, _ = both()
    assert model.loss_function is ForCausalLMLoss and model.loss_type == "ForCausalLM"
