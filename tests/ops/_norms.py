"""What LayerNorm and RMSNorm are tested for alike. Each norm's own test file says which numbers and cases to run it on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass
class Norm:
    """One norm: ours with and without residual, the reference and PyTorch's, each taking (x, [residual,] *params) without eps."""

    ours: Callable
    fused: Callable
    reference: Callable
    theirs: Callable
    params: int  # 1: weight; 2: weight and bias

    def make(self, n: int, dtype: torch.dtype, rows=(3, 5)) -> list[torch.Tensor]:
        """x [*rows, n], a weight about 1 and a bias."""
        return [torch.randn(*rows, n).to(dtype), (torch.randn(n) + 1).to(dtype), torch.randn(n).to(dtype)][: 1 + self.params]

    def compare(self, check, inputs, needs=None, **how):
        return check.no_worse(self.ours, self.reference, self.theirs, inputs, needs, **how)

    def every_gradient_subset(self, check, n, dtype):
        inputs = self.make(n, dtype)
        for needs in check.subsets(1 + self.params):  # at width 1, dx is what eps leaves of a difference
            self.compare(check, inputs, needs, floor=1.0 if n == 1 else 1e-30)

    def strided_and_broadcast(self, check, dtype):
        x, weight, *bias = self.make(257, dtype)
        views = {
            "slice of a wider projection": torch.randn(3, 5, 600).to(dtype)[..., 100:357],
            "transposed tokens": x.transpose(0, 1),
            "transposed channels": torch.randn(3, 257, 5).to(dtype).transpose(1, 2),
            "broadcast rows": x[:1, :1].expand(3, 5, 257),
            "one row": x[0, 0],
        }
        for view in views.values():
            self.compare(check, [view, weight, *bias])
        self.compare(check, [x, weight[:1].expand(257), *bias])
        # a cotangent of any strides: sum() gives one of stride 0
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(self.ours(leaf, weight, *bias).float().sum(), leaf)
        (want,) = torch.autograd.grad(self.reference(leaf, weight, *bias).float().sum(), leaf)
        torch.testing.assert_close(grad.float(), want.float(), atol=2e-2 if dtype.itemsize == 2 else 1e-5, rtol=1e-2)

    def hard_rows(self, check, dtype):
        n, big = 768, 2e4 if dtype == torch.float16 else 1e4
        _, weight, *bias = self.make(n, dtype)
        noise = torch.randn(4, n)
        for x in (noise * big / 4, noise + 100, torch.full((4, n), 3.0), noise * 1e-4, torch.zeros(4, n)):
            self.compare(check, [x.to(dtype), weight, *bias])
        equal, (_, wide, *rest) = torch.full((2, 11008), 3.0).to(dtype), self.make(11008, dtype)
        equal = equal + equal.new_tensor([[0.0], [0.1]])  # every addition errs to the same side
        self.compare(check, [equal, wide, *rest], floor=1.0)
        zero = weight.clone()
        zero[::3] = 0  # x_hat must not be rebuilt from y
        self.compare(check, [noise.to(dtype), zero, *bias])

    def every_16_bit_number(self, dtype, n):
        """Subnormals, infinities, nan and what rounds to them, from views at any address: h = x + residual is rounded once, to the bit."""
        rows = -(-(2**16) // n)
        every = torch.arange(rows * n).to(torch.int16).view(dtype)
        for offset in (0, 1, 5):
            x = torch.cat([every[:offset], every])[offset:].view(rows, n)
            for residual in (torch.zeros(rows, n, dtype=dtype), every.flip(0).view(rows, n), every.roll(7777).view(rows, n)):
                y, h = self.fused(x, residual, *[torch.ones(n, dtype=dtype)] * self.params)
                torch.testing.assert_close(h, (x.float() + residual.float()).to(dtype), rtol=0, atol=0, equal_nan=True)
                if dtype == torch.float16:  # squares of the largest bfloat16 are not finite
                    assert torch.equal(y.isnan().any(-1), ~h.isfinite().all(-1))

    def wide_rows(self, check, dtype):
        """Seven of them: four at once in backward, then three."""
        inputs = self.make(4099, dtype, rows=(7,))
        for needs in check.subsets(1 + self.params):
            self.compare(check, inputs, needs)

    def larger_than_caches(self, rows, n, carry):
        """dx, and with ``carry`` the sum's gradient in it, may be stored past the caches; rows do not see each other."""
        x, residual, dy, dh = (torch.randn(rows, n) for _ in range(4))
        params = [torch.randn(n) for _ in range(self.params)]

        def dx(part):
            leaf = x[part].clone().requires_grad_()
            outputs = self.fused(leaf, residual[part], *params)[: 1 + carry]
            return torch.autograd.grad(outputs, leaf, [dy[part], dh[part]][: 1 + carry])[0]

        parts = [dx(slice(at, at + rows // 4)) for at in range(0, rows, rows // 4)]
        assert torch.equal(dx(slice(None)), torch.cat(parts))

    def empty_batch(self, check, shape):
        params = [torch.ones(shape[-1]) for _ in range(self.params)]
        (y,), (dx, *dparams) = check.run(self.ours, [torch.empty(shape), *params])
        assert y.shape == dx.shape == shape
        assert all(torch.equal(d, torch.zeros(shape[-1])) for d in dparams)

    def residual(self, check, dtype):
        x, *params = self.make(257, dtype)
        inputs = [x, torch.randn_like(x), *params]

        def plain(norm):
            return lambda x, residual, *params: (norm(x + residual, *params), x + residual)

        for needs in check.subsets(2 + self.params):
            check.no_worse(self.fused, plain(self.reference), plain(self.theirs), inputs, needs)
        first = [lambda *a, f=f: f(*a)[0] for f in (self.fused, plain(self.reference), plain(self.theirs))]
        _, grads = check.no_worse(*first, inputs)
        assert torch.equal(grads[0], grads[1])  # the same gradient for both terms
        unused = (True, True) + (False,) * self.params
        _, grads = check.run(lambda *a: self.fused(*a)[1], inputs, unused)  # y unused
        assert torch.equal(grads[0], grads[1])

    def saved_bytes(self, check, statistics: int, nothing: tuple):
        """x and ``statistics`` numbers a row, except for the subsets of gradients in ``nothing``."""
        x, *params = self.make(768, torch.bfloat16)
        per_row = 15 * 4 * statistics
        for needs in check.subsets(1 + self.params):
            inputs = [t.clone().requires_grad_(need) for t, need in zip((x, *params), needs)]
            want = 0 if needs in nothing else x.nbytes + per_row
            assert check.saved_bytes(self.ours, inputs, free=inputs[1:]) == want, needs
        inputs = [t.clone().requires_grad_() for t in (x, x, *params)]
        fused = check.saved_bytes(lambda *a: self.fused(*a)[0], inputs, free=inputs[2:])
        assert fused == x.nbytes + per_row  # the sum, not its terms

    def reference_gradients(self):
        inputs = [t.requires_grad_() for t in self.make(7, torch.float64)]
        assert torch.autograd.gradcheck(self.reference, inputs)
        assert torch.autograd.gradcheck(self.ours, inputs)

    def compiles_and_repeats(self, check):
        x, *params = self.make(257, torch.float32)
        check.compiles(self.ours, [x, *params])
        check.compiles(self.ours, [x, *params], (False, True, False)[: 1 + self.params])
        check.compiles(self.fused, [x, torch.randn_like(x), *params])
        check.deterministic(self.ours, self.make(768, torch.float32, rows=(400,)))

    def same_sums_on_any_number_of_threads(self):
        x, weight, *bias = self.make(768, torch.float32, rows=(500,))
        threads, results = torch.get_num_threads(), []
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                leaf = weight.clone().requires_grad_()
                results.append(torch.autograd.grad(self.ours(x, leaf, *bias).square().sum(), leaf)[0])
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
