"""Batches padded for steps of static shapes give the loss and the gradients of the batches themselves."""

import pytest
import torch
from static_batches import PLANS, Data, batch_of, inputs_of, model_of

from fastpeft.cost.graphs import most_tokens
from fastpeft.data.buckets import measured_batch, padded, up
from fastpeft.fused.head.outputs import lean_logits
from fastpeft.models import family_of
from fastpeft.static_shapes import NotStatic, Seeds, first_rows, mixed, static_shapes
from fastpeft.train.capturable import why_not


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    hooks = [p.register_post_accumulate_grad_hook(lambda p: leaf(p).metadata.update(old=True)) for p in trained]
    loss.backward()
    for hook in hooks:
        hook.remove()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@torch.enable_grad()
def leaf(p):
    return p.expand_as(p).grad_fn.next_functions[0][0]


def leaf_is_alive(p) -> bool:
    """Whether something still holds the node that added to p's gradient: in a capture it would add on the stream that it was made on."""
    return "old" in leaf(p).metadata


def compare(name, model, batch, samples, longest=48):
    inputs = inputs_of(model, batch, torch.float64)
    terms = Data(model, inputs).weight(batch)
    own = measured_batch(inputs, batch, samples, family_of(model).image_tokens(model.config))
    bucket = own.bucket.rounded(longest)
    with lean_logits(model):
        loss = model(**inputs).loss
        want = gradients(model, loss)
        with static_shapes(bucket.sizes, Seeds(0, torch.device("cpu"))):
            got = model(**padded(own, bucket), num_items_in_batch=torch.tensor(float(terms), dtype=torch.float64)).loss
            have = gradients(model, got)
    loss, got = loss.detach(), got.detach()
    assert not any(map(leaf_is_alive, filter(lambda p: p.requires_grad, model.parameters())))
    torch.testing.assert_close(got, loss, rtol=1e-12, atol=0.0)
    assert have.keys() == want.keys() and len(want) > 3
    largest = max(float(grad.abs().max()) for grad in want.values())
    for key, grad in want.items():
        torch.testing.assert_close(have[key], grad, rtol=1e-9, atol=1e-14 * largest, msg=lambda m, key=key: f"{key}: {m}")
    return bucket


@pytest.mark.parametrize("plan", ["LoRA/LoRA/LoRA", "F/IA3/Prefix", "T/PTv2/T"])
def test_questions(plan):
    model = model_of("miss-tiny", False, plan, dtype=torch.float64)
    batches = [batch_of("miss-tiny", model, number) for number in range(4)]
    seen = {compare("miss-tiny", model, batch, samples) for batch in batches for samples in (3, 5)}
    assert {bucket.questions_per_image for bucket in seen} > {1}


@pytest.mark.parametrize("name", [name for name in PLANS if name != "miss-tiny"])
def test_texts(name):
    model = model_of(name, False, dtype=torch.float64)
    for number, images in enumerate(["some", "every", "none"] if name != "llama-tiny" else ["none", "none"]):
        for packed in (False, True):
            compare(name, model, batch_of(name, model, number, packed=packed, images=images), 3 + (number == 1))


def test_sizes_go_up_to_steps_of_an_octave():
    assert [up(n, 2) for n in (1, 8, 9, 12, 13, 16, 17, 33, 48, 49)] == [8, 8, 12, 12, 16, 16, 24, 48, 48, 64]
    assert [up(n, 4) for n in (17, 20, 21, 28, 29)] == [20, 20, 24, 28, 32] and [up(n, 1, 4) for n in (3, 5, 9)] == [4, 8, 16]
    for steps in (1, 2, 4):
        for n in range(1, 300):
            assert n <= up(n, steps) <= max(8, n * (1 + 1 / steps))


def test_rows_in_their_order_then_others():
    wanted = torch.tensor([False, True, False, True, True])
    assert first_rows(wanted, 4).tolist() == [1, 3, 4, 0]


def test_what_cannot_be_laid_out_says_so():
    mask = torch.tensor([[0, 1, 1], [1, 1, 0]])
    text = {"input_ids": mask, "attention_mask": mask, "labels": mask}
    with pytest.raises(NotStatic, match="left"):
        measured_batch(text, {}, 2, 0)
    asked = text | {"attention_mask": torch.ones_like(mask), "pixel_values": torch.zeros(1, 3, 2, 2), "image_index": torch.tensor([0, 3])}
    with pytest.raises(NotStatic, match="image_index"):
        measured_batch(asked, {}, 2, 0)
    with pytest.raises(NotStatic, match="places of its image"):
        measured_batch(asked | {"image_index": torch.tensor([0, 0]), "image_mask": mask == 0}, {}, 2, 2)


def test_seeds_follow_the_counter_alone():
    def drawn(seed, steps, count=1500):
        seeds = Seeds(seed, torch.device("cpu"))
        for _ in range(steps):
            seeds.advance()
        return [int(seeds.next()) for _ in range(count)]

    assert drawn(3, 2) == drawn(3, 2) and min(drawn(3, 2)) >= 0
    for other in (drawn(3, 1), drawn(4, 2)):
        assert len(set(drawn(3, 2)) & set(other)) < 5
    assert len(set(drawn(0, 1))) > 1490


def test_mixed_is_splitmix64s_finaliser():
    def exact(z):
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    for value in (0, 1, -1, 2**62 + 12345, -(2**63)):
        assert int(mixed(torch.tensor(value))) % 2**64 == exact(value % 2**64)


class Own(torch.nn.Linear):
    """A user's module, which may count its calls."""


def test_why_steps_are_not_captured():
    def told(change=None, device="cuda", **how):
        model = model_of("llama-tiny", False)
        if change is not None:
            change(model)
        return why_not(model, torch.device(device), **{"budget": False, "mixed": False} | how)

    assert told() == "" and "cpu" in told(device="cpu") and "memory_budget" in told(budget=True) and "data set" in told(mixed=True)
    assert "again in backward" in told(lambda model: model.gradient_checkpointing_enable())
    assert "lm_head, a Own" in told(lambda model: setattr(model.lm_head, "__class__", Own))
    assert "hooks" in told(lambda model: model.model.norm.register_forward_hook(lambda *args: None))
    assert "hooks" in told(lambda model: setattr(model.model.norm, "forward", model.model.norm.forward))
    assert "gradient of" in told(lambda model: next(filter(lambda p: p.requires_grad, model.parameters())).register_hook(lambda grad: grad))
    assert "does from step to step" in told(lambda model: setattr(model.lm_head, "__class__", type("Linear", (torch.nn.Linear,), {})))
    torch.set_autocast_enabled("cuda", True)  # as torch.autocast does where there is a GPU
    try:
        assert "autocast" in told()
    finally:
        torch.set_autocast_enabled("cuda", False)
    with torch.autograd.detect_anomaly(check_nan=False):
        assert "anomaly" in told()
    stranger = Own(2, 2)
    assert "Own reads of a batch" in why_not(stranger, torch.device("cuda"), budget=False, mixed=False)
    assert why_not(model_of("miss-tiny", True), torch.device("cuda"), budget=False, mixed=False) == ""  # drop-path is a hook of ours


def test_up_to_which_size_a_step_is_a_graph():
    """By sizes alone, so that a resumed run pads as before; fewer tokens where products take longer, and where the model is larger."""
    most, wide = most_tokens(model_of("llama-tiny", False).bfloat16()), model_of("llama-tiny", False)
    assert most == most_tokens(model_of("llama-tiny", False).half()) == pytest.approx(7.5 * most_tokens(wide))
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        assert most_tokens(wide) == pytest.approx(most / 2)
    finally:
        matmul.fp32_precision = before
    larger = torch.nn.Linear(wide.lm_head.in_features, 3 * sum(p.numel() for p in wide.parameters()) // wide.lm_head.in_features)
    few = most_tokens(wide)
    wide.lm_head = larger
    assert most_tokens(wide) < few / 2
