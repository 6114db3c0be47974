"""PEFT's methods on optimised models: losses and gradients of PEFT alone, whatever it is asked for; what is not fused runs as it is."""

import copy

import pytest
import torch
from small_steps import DOUBLE, SINGLE, bert, llama, same, scattered, sentences, step, text

import fastpeft as fp

peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::UserWarning")]
DECODER = ["q_proj", "v_proj", "down_proj"]
ENCODER = ["query", "value", "output.dense"]


def lora(targets, **more):
    return peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **more)


LORA = {
    "LoRA": {},
    "DoRA": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "LoRA with biases": {"lora_bias": True},
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only"},
    "layers_to_transform": {"layers_to_transform": [1]},
    "exclude_modules": {"exclude_modules": r".*\.1\..*"},
}
OTHERS = {
    "VeRA": ("VeraConfig", {"r": 4}),
    "LoHa": ("LoHaConfig", {"r": 2}),
    "LoKr": ("LoKrConfig", {"r": 2}),
    "AdaLoRA": ("AdaLoraConfig", {"target_r": 2, "init_r": 4, "total_step": 10}),
    "OFT": ("OFTConfig", {"oft_block_size": 4}),
    "BOFT": ("BOFTConfig", {"boft_block_size": 4}),
    "HRA": ("HRAConfig", {"r": 4}),
    "FourierFT": ("FourierFTConfig", {"n_frequency": 20}),
    "VB-LoRA": ("VBLoRAConfig", {"r": 2, "vector_length": 4, "num_vectors": 16, "topk": 2}),
    "RandLora": ("RandLoraConfig", {"r": 4}),
    "C3A": ("C3AConfig", {"block_size": 8}),
    "SHiRA": ("ShiraConfig", {"r": 2, "init_weights": False}),
    "MiSS": ("MissConfig", {"r": 4, "init_weights": False}),
    "RoAd": ("RoadConfig", {"group_size": 8, "init_weights": False}),
    "WaveFT": ("WaveFTConfig", {"n_frequency": 20, "init_weights": False}),
    "DeLoRA": ("DeloraConfig", {"r": 4}),
    "GraLoRA": ("GraloraConfig", {"r": 4, "gralora_k": 2, "init_weights": False}),
    "OSF": ("OSFConfig", {}),
    "LN tuning": ("LNTuningConfig", {}),
}
MODELS = {
    "llama": (llama, text, DECODER, ["input_layernorm", "norm"], ["lm_head"], SINGLE),
    "bert": (bert, sentences, ENCODER, ["LayerNorm"], ["classifier"], DOUBLE),
}


def config_of(name, kind):
    _, _, targets, norms, head, _ = MODELS[kind]
    if name in LORA:
        return lora(targets, **LORA[name])
    if name == "patterns":
        return lora(targets, rank_pattern={targets[0]: 2, targets[2]: 6}, alpha_pattern={targets[1]: 3})
    if name == "modules_to_save":
        return lora(targets, modules_to_save=head)
    if name == "trainable_token_indices":
        return lora(targets, trainable_token_indices=list(range(3, 20)))
    if name == "target_parameters":
        return lora([targets[0]], target_parameters=[f"{targets[1]}.weight"])
    if name == "IA3":
        return peft.IA3Config(target_modules=targets, feedforward_modules=[targets[2]], init_ia3_weights=False)
    cls, options = OTHERS[name]
    if not hasattr(peft, cls):
        pytest.skip(f"this peft has no {cls}")
    return getattr(peft, cls)(target_modules=norms if name == "LN tuning" else targets, **options)


NAMES = [*LORA, "patterns", "modules_to_save", "trainable_token_indices", "target_parameters", "IA3", *OTHERS]


def wrapped(name, kind, optimised=False):
    base = MODELS[kind][0]()
    if optimised:
        fp.optimize(base)
    torch.manual_seed(4)
    return scattered(peft.get_peft_model(base, config_of(name, kind)))


@pytest.mark.parametrize(("name", "kind"), [*((name, "llama") for name in NAMES), *((name, "bert") for name in (*LORA, "IA3", "VeRA"))])
def test_a_step(name, kind):
    """Optimised after PEFT wrapped it, and before."""
    close, batch = MODELS[kind][-1], MODELS[kind][1]()
    model, first = wrapped(name, kind), wrapped(name, kind, optimised=True)
    want = step(model, batch)
    same(step(first, batch), want, **close)
    fp.optimize(model)
    same(step(model, batch), want, **close)
    fp.optimize(first)
    same(step(first, batch), want, **close)
    fp.restore(first)
    same(step(first, batch), want, **close)


MERGED = ["LoRA", "DoRA", "rslora", "IA3", "LoHa", "LoKr", "OFT", "VeRA", "LN tuning", "target_parameters"]


@pytest.mark.parametrize(("name", "kind"), [*((name, "llama") for name in MERGED), *((name, "bert") for name in MERGED[:4])])
def test_switched_merged_saved(name, kind, tmp_path):
    close, batch = MODELS[kind][-1], MODELS[kind][1]()
    model = wrapped(name, kind).eval()
    fused = copy.deepcopy(model)
    fp.optimize(fused)

    def both(context=lambda m: torch.no_grad()):
        out = []
        for one in (model, fused):
            with torch.no_grad(), context(one):
                out.append(one(**batch).logits)
        torch.testing.assert_close(out[1], out[0], **close)
        return out[0]

    used, without = both(), both(lambda m: m.disable_adapter())
    assert (used - without).abs().max() > 1e-3
    for change in ("merge_adapter", "unmerge_adapter"):
        for one in (model, fused):
            getattr(one, change)()
        torch.testing.assert_close(both(), used, rtol=1e-4, atol=2e-5)
    fused.save_pretrained(tmp_path)
    base = MODELS[kind][0]()
    fp.optimize(base)
    loaded = peft.PeftModel.from_pretrained(base.double(), tmp_path).double().eval()
    fp.optimize(loaded)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, used, rtol=1e-4, atol=2e-5)
        whole = fused.merge_and_unload()
        torch.testing.assert_close(whole(**batch).logits, used, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_several_adapters(kind, tmp_path):
    """Switched, added, weighted, deleted, hot-swapped."""
    from peft.utils.hotswap import hotswap_adapter

    close, batch, targets = MODELS[kind][-1], MODELS[kind][1](), MODELS[kind][2]
    torch.manual_seed(5)
    model = peft.get_peft_model(MODELS[kind][0](), lora(targets))
    model.add_adapter("other", lora(targets[:2], lora_alpha=3))
    model = scattered(model)
    fused = copy.deepcopy(model)
    fp.optimize(fused)

    def both():
        want = step(model, batch)
        same(step(fused, batch), want, **close)
        return want["loss"]

    losses = [both()]
    for chosen in ("other", "default"):
        for one in (model, fused):
            one.set_adapter(chosen)
        losses.append(both())
    for one in (model, fused):
        one.base_model.set_adapter(["default", "other"])
    losses.append(both())
    for one in (model, fused):
        one.add_weighted_adapter(["default", "default"], [0.3, 0.5], "mixed", combination_type="linear")
        one.set_adapter("mixed")
        for name, p in one.named_parameters():
            p.requires_grad_(".mixed." in name)
    losses.append(both())
    for one in (model, fused):
        one.delete_adapter("mixed")
        one.set_adapter("default")
    other = scattered(peft.get_peft_model(MODELS[kind][0](), lora(targets, lora_alpha=2)))
    other.save_pretrained(tmp_path)
    for one in (model, fused):
        hotswap_adapter(one, tmp_path, adapter_name="default")
        for name, p in one.named_parameters():  # peft 0.18 leaves them frozen when another was deleted
            p.requires_grad_(".default." in name)
    losses.append(both())
    assert losses[0] == losses[2] and len({round(float(loss), 6) for loss in losses}) == len(losses) - 1


@pytest.mark.parametrize("kind", MODELS)
def test_an_adapter_for_each_sample(kind):
    batch, targets = MODELS[kind][1](), MODELS[kind][2]
    model = peft.get_peft_model(MODELS[kind][0](), lora(targets))
    model.add_adapter("other", lora(targets))
    model = scattered(model).eval()
    fused = copy.deepcopy(model)
    fp.optimize(fused)
    names = ["other", "__base__", "default"]
    with torch.no_grad():
        want, got = (m(**batch, adapter_names=names).logits for m in (model, fused))
    torch.testing.assert_close(got, want, **MODELS[kind][-1])
