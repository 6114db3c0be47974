"""Triton's kernels under tests/_sanitizer.py: at ragged edges, from views, with and without what is optional. And what it would find."""

import importlib
import importlib.util
import itertools
from pathlib import Path

import pytest
import torch

from fastpeft import _library, ops
from fastpeft.ops.prefix_attention import join_prefix, join_prefix_bwd

if _library.FORCED != "triton":
    pytest.skip("the kernels' own choices", allow_module_level=True)
import triton
import triton.language as tl

turn = importlib.import_module("fastpeft.ops.excitor_turn")
spec = importlib.util.spec_from_file_location("_sanitizer", Path(__file__).parents[1] / "_sanitizer.py")
_sanitizer = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_sanitizer)


@pytest.fixture
def sanitizer():
    with _sanitizer.Sanitizer().watching() as watching:
        yield watching


def spaced(t):
    """A view whose rows, and whose first element, lie apart from each other and from others'."""
    if t.dim() == 0 or t.dtype == torch.int64:
        return t
    return torch.nn.functional.pad(t, (5, 3))[..., 5 : 5 + t.shape[-1]]


@pytest.mark.parametrize("dtype, layout", [(torch.float32, lambda t: t), (torch.bfloat16, spaced)], ids=["dense", "views"])
def test_every_op_stays_in_its_tensors(check, row, sanitizer, dtype, layout):
    inputs = [layout(t) for t in row.inputs(19, 37, dtype)]
    check.run(row.call, inputs, row.needs(inputs))
    assert any(name.endswith("_kernel") for name in sanitizer.launches)


def test_what_the_table_has_not(check, sanitizer):
    """Dropout, no bias, more ranks than one pass takes, and a prefix of more keys than a block."""
    x, w, A, B = (spaced(torch.randn(s)).bfloat16() for s in ((19, 41), (23, 41), (70, 41), (23, 70)))
    check.run(lambda x, A, B: ops.lora_linear(x, w, None, A, B, 0.5, 0.2), [x, A, B])
    x, *adapter = (torch.randn(s) for s in ((2, 9, 24), (24,), (6, 24), (6,), (2, 24, 3), (2, 24), (2, 9, 2)))
    check.run(lambda x, gamma, *p: ops.norm_mm_adapter(x, gamma, 1e-6, *p, 0.7, 2, 0.2), [x, *adapter])
    q, o, do, dq = (spaced(torch.randn(2, 4, 9, 12)) for _ in range(4))
    prefix, lse = [spaced(torch.randn(2, 19, 12)) for _ in range(2)], torch.randn(2, 4, 9)
    o, lse = join_prefix(q, o, lse, *prefix, 0.3)
    for n in (19, 3):  # the two gradients by a launch each, and by one
        join_prefix_bwd(do, q, o, lse, *(p[:, :n] for p in prefix), dq, 0.3, True)
    assert sanitizer.launches.count("_prefix_attention_bwd_kernel") == 3
    q, k, hidden, angle = (spaced(torch.randn(s)).bfloat16() for s in ((2, 3, 19, 6), (2, 3, 19, 6), (2, 19, 18), (2, 19, 6)))
    tables, params = (angle.cos(), angle.sin()), [torch.randn(s).bfloat16() for s in ((2, 18), (18, 2), (5, 18), (3,))]
    image = [torch.randn(s).bfloat16() for s in ((2, 35, 7), (2, 7), (18, 2), (2, 7), (18, 2))]
    for visual in (None, image):
        turn.excitor_turn(q, k, tables, hidden, *params, visual)
    assert sanitizer.launches.count("_excitor_turn_fwd_kernel") == 2


@triton.jit
def _faulty_kernel(x_ptr, y_ptr, N, FAULT: tl.constexpr, BLOCK: tl.constexpr):
    pid, offs = tl.program_id(0), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < N
    if FAULT == "reads outside":
        mask = offs < N + 1
    if FAULT == "writes what another one touches":
        offs -= pid
    x = tl.load(x_ptr + offs, mask=mask, other=0.0)
    if FAULT == "tl.dot":
        x = tl.sum(tl.dot(tl.broadcast_to(x[:, None], (BLOCK, BLOCK)), tl.broadcast_to(x[None, :], (BLOCK, BLOCK))), 1)
    if FAULT == "writes outside":
        mask = offs <= N
    tl.store(y_ptr + offs, x, mask=mask)
    if FAULT == "reads what another one writes":
        tl.store(y_ptr + offs, tl.load(y_ptr + offs - 1, mask=mask & (offs > 0), other=0.0), mask=mask)


@pytest.mark.parametrize(
    "fault", ["", "reads outside", "writes outside", "writes what another one touches", "reads what another one writes", "tl.dot"]
)
def test_it_finds(sanitizer, fault):
    x, y = torch.randn(32)[:21], torch.zeros(32)[:21]
    _faulty_kernel[(3,)](x, y, 21, FAULT="", BLOCK=8)
    if fault:
        with pytest.raises(Exception, match=fault):
            _faulty_kernel[(3,)](x, y, 21, FAULT=fault, BLOCK=8)


def test_it_finds_the_space_between_rows(sanitizer):
    with pytest.raises(Exception, match="between the elements"):
        _faulty_kernel[(2,)](torch.randn(4, 6)[:, :5].flatten(0), torch.randn(4, 6)[:, :5], 16, FAULT="", BLOCK=8)


FAR = (1 << 30) + 16  # elements from a row to the next: 32 bits hold them, and not those of two rows


@pytest.fixture
def far(tmp_path):
    """Rows that far apart, in a sparse file, of which only what is touched is there."""
    made = itertools.count()

    def spread(t):
        memory = torch.from_file(str(tmp_path / f"{next(made)}"), shared=True, size=(t.shape[0] - 1) * FAR + t.shape[1], dtype=t.dtype)
        return memory.as_strided(t.shape, (FAR, 1)).copy_(t)

    return spread


def test_offsets_of_more_than_32_bits(far):
    """Rows of x, ranks of S: the numbers of dense ones."""
    branch = importlib.import_module("fastpeft.kernels.lora_branch")
    x, A, B, t = (torch.randn(s) for s in ((19, 24), (3, 24), (24, 3), (3, 19)))
    s, dense = far(torch.zeros(3, 19)), torch.zeros(3, 19)
    up, wanted = torch.zeros(2, 19, 24)
    branch.project_down(far(x), A, s, B=B, up=up)
    branch.project_down(x, A, dense, B=B, up=wanted)
    assert torch.equal(s, dense) and torch.equal(up, wanted)
    up, wanted = torch.zeros(2, 19, 24)
    assert torch.equal(branch.branch_pass(far(x), far(t), A, outer=True, up=up), branch.branch_pass(x, t, A, outer=True, up=wanted))
    assert torch.equal(up, wanted)


def test_grids_of_very_many_rows(monkeypatch):
    """Counted, not run: 65,535 programs along any axis of a grid but the first are all that a card launches."""
    from triton.runtime.interpreter import GridExecutor

    branch, excitor = (importlib.import_module(f"fastpeft.kernels.{name}") for name in ("lora_branch", "excitor_keys"))
    grids = []
    monkeypatch.setattr(GridExecutor, "__call__", lambda executor, *args, **kwargs: grids.append(executor.grid))
    one = torch.zeros(1, 1)
    branch.branch_pass(None, one.expand(1, 10**7), one, up=one.expand(10**7, 1))
    M, (K, R) = 10**7 // 4, (2, 1)
    k, u, prompt = one.expand(1, 1, M, 1), one[None].expand(1, M, R), one.expand(K, 1)
    excitor.excitor_merge_fwd(k, u, one.expand(1, R, K), None, prompt, None, one[0])
    assert len(grids) == 2 and all(max(grid[1:]) <= _sanitizer.MOST_PROGRAMS for grid in grids)
