"""accelerate around optimised models: prepare, offloading hooks, dispatch over CPU and disk."""

import copy

import pytest
import torch
from small_steps import DOUBLE, SINGLE, bert, llama, same, scattered, sentences, step, text

import fastpeft as fp

accelerate = pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::UserWarning")]
KINDS = {"llama": (llama, text, ["q_proj", "v_proj", "down_proj"], SINGLE), "bert": (bert, sentences, ["query", "output.dense"], DOUBLE)}


def adapted(kind):
    make, _, targets, _ = KINDS[kind]
    return scattered(peft.get_peft_model(make(), peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", [True, False])
def test_prepare(kind, first):
    """Accumulated over two batches, clipped, stepped: the same weights, optimised before prepare or after."""
    _, batch, _, close = KINDS[kind]
    trained = []
    for optimised in (False, True):
        model = adapted(kind)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        if optimised and first:
            fp.optimize(model)
        model, optimizer = accelerator.prepare(model, optimizer)
        if optimised and not first:
            fp.optimize(model)
        for seed in range(4):
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch(seed=seed)).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        trained.append({"loss": torch.zeros(()), **{n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}})
        accelerator.free_memory()
    same(trained[1], trained[0], **close)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", [True, False])
def test_offloaded_to_the_host(kind, first):
    """cpu_offload's hooks bring weights in before each module's forward: nothing may read them from outside."""
    make, batch, _, close = KINDS[kind]
    model = make().double().eval()
    with torch.no_grad():
        want = model(**batch()).logits
        other = copy.deepcopy(model)
        if first:
            fp.optimize(other)
        accelerate.cpu_offload(other, execution_device=torch.device("cpu"))
        assert all(p.is_meta for p in other.parameters())
        if not first:
            report = fp.optimize(other)
            assert any("forward of its own" in reason for _, reason in report.skipped)
        torch.testing.assert_close(other(**batch()).logits, want, **close)
        accelerate.hooks.remove_hook_from_submodules(other)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", [True, False])
def test_dispatched(kind, first, tmp_path):
    """As ``device_map="auto"`` does where memory is short: some modules here, some on the disk."""
    make, batch, _, close = KINDS[kind]
    model = make().double().eval()
    layers = "model.layers" if kind == "llama" else "bert.encoder.layer"
    with torch.no_grad():
        want = model(**batch()).logits
        other = copy.deepcopy(model)
        names = [name for name, m in other.named_modules() if any(True for _ in m.parameters(recurse=False))]
        device_map = {name: "disk" if name.startswith(f"{layers}.1") else "cpu" for name in names}
        device_map = {n: d for n, d in device_map.items() if not n.startswith(layers)} | {f"{layers}.0": "cpu", f"{layers}.1": "disk"}
        if first:
            fp.optimize(other)
        other = accelerate.dispatch_model(other, device_map, main_device="cpu", offload_dir=tmp_path)
        assert any(p.is_meta for p in other.parameters())
        if not first:
            fp.optimize(other)
        torch.testing.assert_close(other(**batch()).logits, want, **close)


@pytest.mark.parametrize("first", [True, False])
def test_training_with_a_frozen_base_on_the_disk(first, tmp_path):
    """Adapters here, a layer's frozen weights on the disk: gradients of the adapters."""
    _, batch, _, close = KINDS["llama"]
    model = adapted("llama")
    want = step(model, batch())
    other = copy.deepcopy(model)
    if first:
        fp.optimize(other)
    for name, module in list(other.named_modules()):
        if name.endswith("layers.1.mlp.gate_proj"):
            accelerate.disk_offload(module, str(tmp_path), execution_device=torch.device("cpu"))
            assert module.weight.is_meta
    if not first:
        fp.optimize(other)
    same(step(other, batch()), want, **close)
