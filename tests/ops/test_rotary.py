"""rotary against transformers' formula, with float64 as the truth."""

import pytest
import torch

from fastpeft import _library
from fastpeft.ops import rotary
from fastpeft.ops.rotary import rotary_reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def theirs(x, cos, sin):
    """transformers.models.llama.modeling_llama.apply_rotary_pos_emb."""
    rot = cos.shape[-1]
    turn, half = x[..., :rot], rot // 2
    return torch.cat((turn * cos + torch.cat((-turn[..., half:], turn[..., :half]), -1) * sin, x[..., rot:]), -1)


TRIPLE = (rotary, rotary_reference, theirs)
ONLY_X = (True, False, False)


def tables(dtype, *shape):
    angle = torch.rand(*shape[:-1], shape[-1] // 2) * 6.3
    angle = torch.cat((angle, angle), -1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def test_backend():
    want = "native" if (_library.FORCED or "native") == "native" else "composite"
    assert _library.backend_of()["rotary"]["CPU"].startswith(want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d,rot", [(2, 2), (64, 64), (128, 128), (257, 252), (80, 20)])
def test_every_gradient_subset(check, d, rot, dtype):
    x = torch.randn(2, 3, 7, d).to(dtype)
    for shape in [(7, rot), (2, 1, 7, rot), (1, rot)]:
        for needs in (ONLY_X, (False,) * 3):
            check.no_worse(*TRIPLE, [x, *tables(dtype, *shape)], needs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_keep_their_strides(check, dtype):
    heads = torch.randn(2, 7, 3, 64).to(dtype).transpose(1, 2)  # [B, H, M, d], heads not split from tokens
    fused = torch.randn(2, 7, 3, 128).to(dtype).transpose(1, 2)[..., :64]
    for x in (heads, fused, torch.randn(2, 3, 64, 7).to(dtype).transpose(2, 3), heads[:, :1].expand(2, 3, 7, 64)):
        for dt in {dtype, torch.float32} - ({torch.float32} if dtype == torch.float64 else set()):
            check.no_worse(rotary, rotary_reference, lambda x, c, s: theirs(x, c.to(dtype), s.to(dtype)), [x, *tables(dt, 7, 64)], ONLY_X)
    assert rotary(heads, *tables(dtype, 7, 64)).stride() == heads.stride()


def test_backward_undoes_forward():
    """A rotation is orthogonal: its gradient of ones, rotated again, is ones; norms are kept."""
    x, (cos, sin) = torch.randn(2, 7, 64, dtype=torch.float64, requires_grad=True), tables(torch.float64, 7, 64)
    y = rotary(x, cos, sin)
    (dx,) = torch.autograd.grad(y, x, y.detach())
    torch.testing.assert_close(dx, x.detach())
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))


def test_saved_gradients_operators_compiler(check):
    x, (cos, sin) = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True), tables(torch.float64, 5, 8)
    assert check.saved_bytes(rotary, (x, cos, sin), free=(cos, sin)) == 0
    assert torch.autograd.gradcheck(lambda x: rotary(x, cos, sin), x)
    for transpose in (False, True):
        torch.library.opcheck(torch.ops.fastpeft.rotary, (x.detach(), cos, sin, transpose))
        torch.library.opcheck(torch.ops.fastpeft.rotary, (x.detach().transpose(0, 1), cos[:, None], sin[:, None], transpose))
    inputs = [torch.randn(2, 7, 3, 64).transpose(1, 2), *tables(torch.float32, 7, 64)]
    check.compiles(rotary, inputs, ONLY_X)
    check.deterministic(rotary, inputs, ONLY_X)
    assert rotary(x[:, :0], cos[:0], sin[:0]).shape == (3, 0, 8)


def test_errors_say_what_to_do():
    x, (cos, sin) = torch.randn(2, 3, 7, 8), tables(torch.float32, 7, 8)
    with pytest.raises(ValueError, match="must match"):
        rotary(x, cos, sin[:1])
    with pytest.raises(ValueError, match="even number"):
        rotary(x[..., :4], cos, sin)
    with pytest.raises(ValueError, match="unsqueeze"):
        rotary(x, *tables(torch.float32, 2, 7, 8))
    with pytest.raises(ValueError, match="detach"):
        rotary(x, cos.requires_grad_(), sin)
    with pytest.raises(TypeError, match="cast"):
        rotary(x, cos.detach().double(), sin.double())
