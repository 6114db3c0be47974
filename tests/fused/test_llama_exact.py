"""The fused LLaMA against transformers' own in float64, everything that a caller may read: loss, logits, hidden states at padding too, and
every gradient, whatever batch, mask, setting or hook."""

import copy

import pytest
import torch
from double import Double
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

import fastpeft as fp
from fastpeft.fused.head.outputs import lean_logits

SHAPE = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 50}


@pytest.fixture(autouse=True)
def double():
    """transformers' norms, rotary tables and loss in float64 instead of float32."""
    with Double():
        yield


def llama(head_trained=False, **config):
    torch.manual_seed(0)
    config = {"num_key_value_heads": 2, "initializer_range": 0.3, **SHAPE, **config}
    model = LlamaForCausalLM(LlamaConfig(**config)).double().train()
    model.lm_head.requires_grad_(head_trained)
    for name, p in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(p, 1.0, 0.2)
    return model


def ids_and_labels():
    torch.manual_seed(1)
    ids = torch.randint(3, 50, (4, 9))
    return ids, torch.where(torch.rand(ids.shape) < 0.6, ids, -100)


def batches():
    ids, labels = ids_and_labels()
    right, left, holes = (torch.ones_like(ids) for _ in range(3))
    right[1, 6:], right[2, 3:], left[1, :4], left[3, :2], holes[0, 3], holes[2, 5:7] = 0, 0, 0, 0, 0, 0
    none = right.clone()
    none[3] = 0
    causal = torch.ones(9, 9, dtype=torch.bool).tril()[None, None].repeat(4, 1, 1, 1)
    causal[1, :, :, 2:4] = causal[1, :, 4:, 3] = False
    gapped = torch.tensor([0, 1, 2, 5, 6, 7, 20, 21, 22])[None]
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7, 8]]).repeat(2, 1)
    cut = {name: torch.where(mask.bool(), labels, -100) for name, mask in {"right": right, "left": left}.items()}
    cut["left"][(left.cumsum(1) == 1) & (left == 1)] = -100
    yield "full", {"labels": labels}
    yield "right", {"attention_mask": right, "labels": cut["right"]}
    yield "left", {"attention_mask": left, "labels": cut["left"]}
    yield "holes", {"attention_mask": holes, "labels": labels}
    yield "labels at right padding", {"attention_mask": right, "labels": ids.clone()}
    yield "labels at left padding", {"attention_mask": left, "labels": ids.clone()}
    yield "nothing attended to", {"attention_mask": none, "labels": ids.clone()}
    yield "mask of ones", {"attention_mask": torch.ones_like(ids), "labels": labels}
    yield "float mask", {"attention_mask": right.double(), "labels": labels}
    yield "4-D bool", {"attention_mask": causal, "labels": labels}
    yield "4-D float", {"attention_mask": torch.zeros(4, 1, 9, 9).double().masked_fill(~causal, -1e9), "labels": labels}
    yield "gapped", {"position_ids": gapped, "labels": labels}
    yield "gapped, no cache", {"position_ids": gapped, "labels": labels, "use_cache": False}
    yield "packed", {"position_ids": packed, "labels": labels}
    yield "packed, no cache", {"position_ids": packed, "labels": labels, "use_cache": False}
    yield "positions and mask", {"position_ids": packed, "attention_mask": right, "labels": labels, "use_cache": False}
    yield "items", {"labels": labels, "num_items_in_batch": 7}
    yield "another ignored label", {"labels": labels.masked_fill(labels == -100, 3), "ignore_index": 3}
    yield "shifted labels", {"labels": labels, "shift_labels": labels.roll(-1, 1)}
    yield "flat shifted labels", {"labels": labels, "shift_labels": labels.roll(-1, 1).flatten()}
    yield "no labels", {"attention_mask": right}
    yield "not causal at this call", {"labels": labels, "attention_mask": right, "is_causal": False}


BATCHES = dict(batches())


def results(model, given, read=("loss", "logits"), **more):
    """What a caller reads, and every gradient of the loss and of all logits."""
    model.zero_grad()
    out = model(input_ids=ids_and_labels()[0], **given, **more)
    given = {name: out[name] for name in read if name in out}
    sum(t.sin().sum() if name == "logits" else t for name, t in given.items()).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {name: t.detach() for name, t in given.items()} | {"keys": tuple(out), "len": len(out.to_tuple())}


def assert_same(mine, theirs):
    assert mine.keys() == theirs.keys() and len(mine) > 3
    for name, want in theirs.items():
        if not isinstance(want, torch.Tensor):
            assert mine[name] == want, name
            continue
        torch.testing.assert_close(mine[name], want, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}", equal_nan=True)


def fused(model, **options):
    model = copy.deepcopy(model)
    fp.optimize(model, **options)
    return model


@pytest.mark.parametrize(("attention", "head_trained"), [("sdpa", False), ("sdpa", True), ("eager", False)])
@pytest.mark.parametrize("batch", BATCHES)
def test_all_that_is_read(batch, attention, head_trained):
    model = llama(head_trained, attn_implementation=attention)
    assert_same(results(fused(model), BATCHES[batch]), results(model, BATCHES[batch]))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("batch", [name for name in BATCHES if name != "no labels"])
def test_the_loss_alone(batch, attention):
    """Where nobody reads logits, they are None and less is computed; the loss and its gradients stay."""
    model = llama(attn_implementation=attention)
    mine = results(fused(model, lean_logits=True), BATCHES[batch], ("loss",))
    theirs = results(model, BATCHES[batch], ("loss",))
    assert "logits" not in mine.pop("keys") and mine.pop("len") and theirs.pop("keys") and theirs.pop("len")
    assert_same(mine, theirs)


PLACES = ["model", "model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.2", "model.layers.1.self_attn", "model.norm"]
PLACES += ["model.layers.1.input_layernorm", "model.layers.2.post_attention_layernorm", "model.layers.0.mlp", "model.layers.2.mlp.act_fn"]
PLACES += ["model.layers.1.self_attn.q_proj", "model.layers.2.self_attn.o_proj", "model.layers.2.mlp.down_proj", "lm_head"]


@pytest.mark.parametrize(("lean", "attention"), [(False, "sdpa"), (True, "sdpa"), (True, "eager")])
@pytest.mark.parametrize("batch", ["right", "left", "packed, no cache"])
@pytest.mark.parametrize("place", PLACES)
def test_a_hook_sees_and_changes_what_it_would(place, batch, attention, lean):
    """It adds a vector to sample 0's second token, and notes what it saw."""
    model = llama(attn_implementation=attention)
    found = []
    for one in (model, fused(model, lean_logits=lean)):
        seen = []

        def hook(module, args, kwargs, out, seen=seen):
            first = out if isinstance(out, torch.Tensor) else out[0]
            given = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
            returned = out if isinstance(out, tuple) else (first,)
            seen.append([t.shape for t in (*given, *returned) if t is not None])
            seen.append(first.detach().clone())
            shift = torch.zeros_like(first)
            shift[0, 1] = torch.linspace(0, 1, first.shape[-1], dtype=first.dtype)
            if isinstance(out, torch.Tensor):
                return out + shift
            if isinstance(out, tuple):
                return (first + shift, *out[1:])
            out.last_hidden_state = first + shift
            return out

        one.get_submodule(place).register_forward_hook(hook, with_kwargs=True)
        found.append(results(one, BATCHES[batch], ("loss",)) | dict(enumerate(seen)))
    theirs, mine = found
    assert len(theirs["keys"]) >= len(mine["keys"])
    for name in ("keys", "len"):
        theirs.pop(name), mine.pop(name)
    assert_same(mine, theirs)


def test_a_hook_on_every_module_sees_every_module():
    model, found = llama(), []
    for one in (model, fused(model, lean_logits=True)):
        seen = []
        hook = torch.nn.modules.module.register_module_forward_hook(
            lambda module, args, out, seen=seen: seen.append((type(module).__name__, getattr(out, "shape", None)))
        )
        found.append(results(one, BATCHES["right"], ("loss",)) | {"seen": seen})
        hook.remove()
    for one in found:
        del one["keys"], one["len"]
    assert_same(found[1], found[0])


def set_is_causal(model):
    model.config.is_causal = False
    for layer in model.model.layers:
        layer.self_attn.is_causal = False


def set_is_causal_of_attention(model):
    for layer in model.model.layers:
        layer.self_attn.is_causal = False


def set_scaling(model):
    model.model.layers[1].self_attn.scaling *= 2
    model.model.layers[2].self_attn.scaling = torch.tensor(0.3, dtype=torch.float64)


def set_loss(model):
    def loss_function(logits, labels, vocab_size, **kwargs):
        return (logits[..., 0] * (labels > 0)).sum() / vocab_size

    model.loss_function = loss_function


def set_attention(model):
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attention(module, q, k, v, mask, **kwargs):
        return sdpa_attention_forward(module, q, k * 1.5, v, mask, **kwargs)

    AttentionInterface.register("stretched", attention)
    AttentionMaskInterface.register("stretched", sdpa_mask)
    model.set_attn_implementation("stretched")


def set_layers(model):
    model.config.num_hidden_layers = 2


def set_norms(model):
    model.model.layers[1].input_layernorm.variance_epsilon = 0.1


def set_activation(model):
    model.model.layers[0].mlp.act_fn = torch.nn.Tanh()


def set_rotary(model):
    class Rotary(modeling_llama.LlamaRotaryEmbedding):
        def forward(self, x, position_ids):
            assert x.dim() == 3
            return tuple(t * 0.9 for t in super().forward(x, position_ids))

    model.model.rotary_emb = Rotary(model.config)


def set_layer(model):
    class Half(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer, self.self_attn = layer, layer.self_attn

        def forward(self, hidden_states, **kwargs):
            return 0.5 * self.layer(hidden_states, **kwargs)

    model.model.layers[1] = Half(model.model.layers[1])


SETTINGS = [set_is_causal, set_is_causal_of_attention, set_scaling, set_loss, set_attention, set_layers, set_norms, set_activation]
SETTINGS += [set_rotary, set_layer]


@pytest.mark.parametrize(("when", "attention"), [("before", "sdpa"), ("after", "eager"), ("lean after", "sdpa")])
@pytest.mark.parametrize("batch", ["full", "left", "packed, no cache", "labels at right padding"])
@pytest.mark.parametrize("change", SETTINGS)
def test_settings(change, batch, attention, when):
    """Changed before optimize, or behind its back."""
    model = llama(attn_implementation=attention)
    mine = copy.deepcopy(model)
    for step in (lambda: change(mine), lambda: fp.optimize(mine, lean_logits="lean" in when))[:: 1 if when == "before" else -1]:
        step()
    change(model)
    read = ("loss",) if "lean" in when else ("loss", "logits")
    found = [results(one, BATCHES[batch], read) for one in (mine, model)]
    if "lean" in when:
        for one in found:
            del one["keys"], one["len"]
    assert_same(*found)


@pytest.mark.parametrize("how", ["call", "configuration"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_hidden_states_and_attentions(attention, how):
    model, asked = llama(attn_implementation=attention), {"output_hidden_states": True, "output_attentions": True}
    if how == "configuration":
        model.config.output_hidden_states, model.config.output_attentions = True, attention == "eager"
        asked = {}
    for batch in ("full", "left"):
        given = {"input_ids": ids_and_labels()[0], **BATCHES[batch], **asked}
        theirs, mine = model(**given), fused(model)(**given)
        assert tuple(theirs) == tuple(mine) and len(mine.hidden_states) == 4
        assert attention == "sdpa" or len(mine.attentions) == 3
        for name in ("hidden_states", "attentions"):
            for a, b in zip(getattr(mine, name) or (), getattr(theirs, name) or ()):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
    after = fused(model)
    after.config.output_hidden_states = after.config.output_attentions = False
    for _ in range(2):  # hooks that collected stay, and see nothing more
        after(**given)
        out = after(input_ids=ids_and_labels()[0], **BATCHES["right"])
        assert out.hidden_states is None


KEPT = {
    "last": 2,
    "positions": torch.tensor([1, 4]),
    "2-D positions": torch.tensor([[1, 4], [0, 8], [2, 2], [7, 3]]),
    "2-D mask": torch.arange(36).view(4, 9) % 5 == 0,
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("keep", KEPT)
def test_logits_to_keep(keep, training):
    model = llama().train(training)
    theirs, mine = (one(ids_and_labels()[0], logits_to_keep=KEPT[keep]).logits for one in (model, fused(model)))
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-11)
    labels = torch.arange(mine[..., 0].numel()).view(mine.shape[:-1]) % 50  # of what was kept: transformers takes them then
    theirs, mine = (one(ids_and_labels()[0], labels=labels, logits_to_keep=KEPT[keep]).loss for one in (model, fused(model)))
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("read", [lambda out: out.logits, lambda out: out["logits"], lambda out: out[1], lambda out: out.to_tuple()[1]])
@pytest.mark.parametrize("head_trained", [False, True])
def test_logits_read_after_the_step_are_those_of_before(read, head_trained):
    found = []
    for one in (model := llama(head_trained), fused(model)):
        out = one(ids_and_labels()[0], **BATCHES["right"])
        out.loss.backward(retain_graph=True)
        with torch.no_grad():
            for p in one.parameters():
                if p.requires_grad:
                    p.data.add_(0.1)
        found.append(read(out))
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("lean", [False, True])
def test_tuples(lean):
    """Parts are known by their places: none is left out, though nobody reads it."""
    model = llama()
    theirs, mine = (one(ids_and_labels()[0], **BATCHES["right"], return_dict=False) for one in (model, fused(model, lean_logits=lean)))
    assert type(mine) is tuple and len(mine) == len(theirs) == 3
    torch.testing.assert_close(mine[:2], theirs[:2], rtol=1e-10, atol=1e-11)


def test_dropout_of_loss_and_logits_is_one_draw():
    """A loss from the logits is the model's own."""
    one = fused(llama(attention_dropout=0.3))
    out = one(ids_and_labels()[0], labels=ids_and_labels()[1])
    own = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids_and_labels()[1][:, 1:].flatten())
    torch.testing.assert_close(own, out.loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_static_caches(side, attention):
    """The first call of a cache of fixed size, whose rest lies behind every token."""
    ids, model = ids_and_labels()[0], llama(attn_implementation=attention).eval()
    how = {"max_new_tokens": 4, "cache_implementation": "static", "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    how |= {"disable_compile": True, "attention_mask": torch.ones_like(ids) if side is None else BATCHES[side]["attention_mask"]}
    assert torch.equal(fused(model).generate(ids, **how), model.generate(ids, **how))


def test_several_tokens_after_a_cache():
    model, ids = llama().eval(), ids_and_labels()[0]
    for one in (pair := (model, fused(model))):
        one.cache = one(ids[:, :5], use_cache=True).past_key_values
    theirs, mine = (one(ids[:, 5:], past_key_values=one.cache).logits for one in pair)
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-11)


def test_left_padding_of_adapted_models_is_not_counted():
    """fastpeft.adapt: samples as alone; the logits of the rest are transformers' in any case."""
    one = fused(llama())
    fp.adapt(one, llm=fp.PTv2(num_virtual_tokens=2))
    given = {name: BATCHES["left"][name] for name in ("attention_mask", "labels")}
    batch = one(ids_and_labels()[0], **given).logits[1, 4:]
    torch.testing.assert_close(one(ids_and_labels()[0][1:2, 4:]).logits[0], batch, rtol=1e-9, atol=1e-10)


def test_lean_computes_less():
    """Labelled positions of the last layer, and no padding: what the option is for."""
    from fastpeft.methods.base import sees_no_values

    one, rows = fused(llama()), []
    for layer in one.model.layers:
        layer.mlp.register_forward_hook(sees_no_values(lambda module, args, out: rows.append(tuple(out.shape[:-1]))))
    with lean_logits(one):
        one(ids_and_labels()[0], **BATCHES["right"])
    real, wanted = int(BATCHES["right"]["attention_mask"].sum()), int((BATCHES["right"]["labels"][:, 1:] != -100).sum())
    assert rows == [(real,), (real,), (wanted,)]
    one(ids_and_labels()[0], **BATCHES["right"])
    assert rows[3:] == [(4, 9)] * 3
