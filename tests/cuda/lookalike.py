"""CUDA devices that are not there: tensors that say ``cuda:0`` or ``cuda:1`` and compute on the CPU, with the rules of real ones.

What our Python does on a GPU (which kernel it chooses, what it puts where, when it waits) runs here to the last line, with numbers. An
operator between a tensor of a device and one of the host or of the other device is an error, as on CUDA; what is made without a device's
number lies on the current one, which is each thread's own; every wait of the host (``item()``, ``nonzero()``,
a copy to the host) is counted, or forbidden by ``torch.cuda.set_sync_debug_mode("error")``. ATen's flash and efficient attention have
CUDA's signatures, layouts and limits. fastpeft's own operators run what serves on CUDA where ``FASTPEFT_BACKEND=composite``, else their
CPU implementation (the Triton kernels under ``FASTPEFT_BACKEND=triton TRITON_INTERPRET=1``). What a kernel does wrong on a real device,
or how long it takes, is not seen here.

Capture and replay: ``torch.cuda.graph`` records every operator with its arguments (tests/cuda/capture.py); what it wrote is then as it was,
and what it made is NaN. ``replay()`` runs the operators again, on the same buffers.

``python tests/cuda/lookalike.py GUARD.so PYTEST-ARGUMENTS`` loads tests/cuda/lookalike.cpp's library before torch, then runs pytest.
"""

from __future__ import annotations

import ctypes
import sys

if __name__ == "__main__":
    library = ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)

import capture
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

from fastpeft import _library

aten = torch.ops.aten
waits: list[str] = []  # every wait of the host so far
_forbidden = False
# operators whose result's shape or value the host must know
WAITING = {
    aten.repeat_interleave.Tensor,
    aten.bincount,
    aten._unique,
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten.equal,
    aten._unique2,
    aten.unique_dim,
    aten.is_nonzero,
}


class OnCUDA(Tensor):
    """A tensor of the device: ``held`` is where it really lies."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device):
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=device
        )
        made.held = held
        return made

    def __repr__(self):
        return f"OnCUDA({self.held})"

    def __reduce_ex__(self, protocol):
        return self.held.__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        if func == Tensor.data_ptr:
            return args[0].held.data_ptr()
        if func == Tensor.tolist:
            _wait("tolist")
            return args[0].held.tolist()
        with torch._C.DisableTorchFunctionSubclass():  # or what comes back from the host would be made one of this class again
            out = func(*args, **(kwargs or {}))
        if func == Tensor.data.__set__:
            capture.refuse("a tensor is put in another's place")
            args[0].held = args[1].held
        return out

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _wait(what: str) -> None:
    if _forbidden:
        raise RuntimeError(f"the host waits for the device: {what}")
    capture.refuse(f"the host waits for the device: {what}", ends=True)
    waits.append(what)


def _sends(func, t: Tensor, non_blocking: bool) -> None:
    """A copy from the host: it waits unless told not to, and every replay would copy what lies there then."""
    if t.numel():
        if not non_blocking:
            _wait(f"{func} from the host")
        capture.refuse(f"{func} takes a tensor of the host, {list(t.shape)} {t.dtype}")


def _on_cuda(device) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def current_device() -> int:
    """This thread's."""
    return library.lookalike_exchange_device(-1)


def _numbered(device) -> torch.device:
    index = None if device is None else torch.device(device).index
    return torch.device("cuda", current_device() if index is None else index)


def _run(func, args, kwargs):
    tensors = [t for t in capture.leaves((args, kwargs)) if isinstance(t, Tensor)]
    ours = [t for t in tensors if isinstance(t, OnCUDA)]
    to_cuda, home = bool(ours), ours[0].device if ours else _numbered(None)
    packet = func.overloadpacket
    kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
    if "device" in kwargs:
        wanted = kwargs["device"]
        if wanted is not None:
            to_cuda, home = _on_cuda(wanted), _numbered(wanted)
            if ours and not to_cuda and torch.device(wanted).type == "cpu":
                _wait(str(func))
            if to_cuda and packet is aten._to_copy and not ours:
                _sends(func, args[0], kwargs.get("non_blocking", False))
        kwargs = kwargs | {"device": None if wanted is not None and _on_cuda(wanted) else wanted}
    elif (packet in WAITING or (func in WAITING and kwargs.get("output_size") is None)) and ours:
        _wait(str(func))
        to_cuda = packet not in (aten._local_scalar_dense, aten.equal, aten.is_nonzero)
    elif packet is aten.copy_:
        if isinstance(args[1], OnCUDA) and not isinstance(args[0], OnCUDA):
            _wait(str(func))
        to_cuda, home = isinstance(args[0], OnCUDA), args[0].device
        if to_cuda and not isinstance(args[1], OnCUDA):
            _sends(func, args[1], args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
    elif ours and func.namespace == "fastpeft":  # they may take what lies on the host, and say so
        if _library.FORCED == "composite":  # what serves on CUDA, on tensors of the device
            with Device():
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args, **kwargs)
    elif ours and packet not in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_):
        strangers = [t for t in tensors if t.device != home and (t.dim() > 0 or isinstance(t, OnCUDA))]
        if strangers:
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, found {home} and {strangers[0].device}")
    if any(isinstance(index, OnCUDA) and index.dtype in (torch.bool, torch.uint8) for index in _indices(packet, args)):
        _wait(f"{func} by a mask")
    implementation = AS_ON_CUDA.get(func, AS_ON_CUDA.get(packet, func)) if ours else func
    inner_args, inner_kwargs = capture.mapped(lambda t: t.held, OnCUDA, (args, kwargs))
    if ours or to_cuda:
        hosts = [t for t in tensors if not isinstance(t, OnCUDA)]
        out = capture.run(func, implementation, inner_args, inner_kwargs, hosts)
    else:
        out = implementation(*inner_args, **inner_kwargs)
    if to_cuda:
        out = capture.mapped(lambda t: t if isinstance(t, OnCUDA) else OnCUDA(t, home), Tensor, out)
    if implementation is not func or not ours:
        return out
    return return_and_correct_aliasing(func, args, kwargs, out)


def _indices(packet, args):
    return args[1] if packet in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_) else ()


# ATen's CUDA attention, by the CPU's


def _flash(q, k, v, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    assert q.dtype in (torch.bfloat16, torch.float16) and dropout_p == 0.0 and q.shape[-1] % 8 == 0
    o, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, attn_mask=_at_the_last(q, k, is_causal), scale=scale)
    seed = torch.zeros(2, dtype=torch.uint64)
    return o, lse.contiguous(), None, None, q.shape[2], k.shape[2], seed, seed.clone(), q.new_empty(0)


def _flash_backward(do, q, k, v, o, lse, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, seed, offset, *, scale=None):
    mask = _at_the_last(q, k, is_causal)
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(do, q, k, v, o, lse, 0.0, False, attn_mask=mask, scale=scale)


def _at_the_last(q, k, is_causal):
    """CUDA's flash kernel aligns causality at the last query and the last key; the CPU's at the first ones."""
    M, N = q.shape[2], k.shape[2]
    return q.new_full((M, N), -torch.inf).triu(1 + N - M) if is_causal else None


def _bias(mask):
    assert mask is None or all(s % 16 == 0 or n == 1 for s, n in zip(mask.stride()[:-1], mask.shape[:-1])), "rows of a mask unaligned"
    return mask


def _efficient(q, k, v, mask, compute_lse, dropout_p=0.0, is_causal=False, *, scale=None):
    assert q.shape[1] == k.shape[1] and dropout_p == 0.0 and q.dtype != torch.float64
    o, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, attn_mask=_bias(mask), scale=scale)
    rows = -lse.shape[2] % 32
    lse = torch.nn.functional.pad(lse, (0, rows), value=torch.inf) if compute_lse else lse.new_empty(*lse.shape[:2], 0)
    seed = torch.zeros((), dtype=torch.int64)
    return o, lse, seed, seed.clone()


def _efficient_backward(do, q, k, v, mask, o, lse, seed, offset, dropout_p, needs, is_causal=False, *, scale=None):
    assert lse.shape[2] % 32 == 0
    lse = lse[:, :, : q.shape[2]]
    grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        do, q, k, v, o, lse, 0.0, is_causal, attn_mask=_bias(mask), scale=scale
    )
    return *grads, None


def _attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """What SDPA does on CUDA; its own choice is compiled away in a build without."""
    chosen = _choice(q, k, v, attn_mask, dropout_p, is_causal, enable_gqa=enable_gqa)
    if chosen == 1:
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=scale)[0]
    if chosen == 2:
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, -torch.inf)
            N = k.shape[2]
            attn_mask = torch.nn.functional.pad(attn_mask, (0, -N % 16))[..., :N].expand(*q.shape[:3], N)
        needs = any(t.requires_grad for t in (q, k, v))
        return aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, needs, 0.0, is_causal, scale=scale)[0]
    with torch._C.DisableTorchFunctionSubclass():
        how = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask, **how)


def _choice(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):
    """0: written out, 1: flash, 2: efficient."""
    if dropout_p or q.dtype == torch.float64 or q.dim() != 4:
        return 0
    if attn_mask is None and q.dtype != torch.float32 and q.shape[-1] % 8 == 0:
        return 1
    return 0 if enable_gqa else 2


# CUDA's LayerNorm takes parameters of x's dtype and keeps statistics in float32; the CPU's mixes dtypes instead


def _layer_norm(x, shape, weight, bias, eps):
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    assert all(p is None or p.dtype == x.dtype for p in (weight, bias)), "expected scalar type of the input"
    weight = x.new_ones(shape) if weight is None else weight
    return aten.native_layer_norm(x, shape, weight.to(wide), None if bias is None else bias.to(wide), eps)


def _layer_norm_backward(dy, x, shape, mean, rstd, weight, bias, mask):
    assert all(p is None or p.dtype == x.dtype for p in (weight, bias)) and mean.dtype == rstd.dtype != torch.bfloat16
    grads = aten.native_layer_norm_backward(
        dy, x, shape, mean, rstd, *(None if p is None else p.to(mean.dtype) for p in (weight, bias)), mask
    )
    return tuple(None if grad is None else grad.to(x.dtype) for grad in grads)


AS_ON_CUDA = {
    aten.mm.dtype: lambda a, b, out_dtype: a.to(out_dtype) @ b.to(out_dtype),
    aten.native_layer_norm: _layer_norm,
    aten.native_layer_norm_backward: _layer_norm_backward,
    aten._scaled_dot_product_flash_attention: _flash,
    aten._scaled_dot_product_flash_attention_backward: _flash_backward,
    aten._scaled_dot_product_efficient_attention: _efficient,
    aten._scaled_dot_product_efficient_attention_backward: _efficient_backward,
}


class Device(TorchDispatchMode):
    """Catches what makes tensors: factories and copies from the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def install() -> None:
    """The device for this process, as torch.cuda's functions see it."""
    import fastpeft.runs.train  # noqa: F401 - what it imports could ask the lookalike for more than it knows
    from fastpeft.ops import _flash

    cuda, generator = torch.cuda, torch.Generator
    for name, value in {
        "_lazy_init": None, "is_available": True, "device_count": 1, "synchronize": None,
        "memory_allocated": 0, "max_memory_allocated": 1 << 30, "reset_peak_memory_stats": None, "get_device_name": "lookalike",
        "get_rng_state_all": [], "set_rng_state_all": None, "get_rng_state": torch.zeros(16, dtype=torch.uint8), "set_rng_state": None,
        "get_device_capability": (9, 0), "is_bf16_supported": True,
    }.items():  # fmt: skip
        setattr(cuda, name, lambda *args, value=value, **kwargs: value)

    def sync_debug_mode(mode):
        global _forbidden
        _forbidden = mode in ("error", 2)

    cuda.set_sync_debug_mode, cuda.get_sync_debug_mode = sync_debug_mode, lambda: 2 * _forbidden
    cuda.current_device = current_device
    cuda._exchange_device = cuda._maybe_exchange_device = library.lookalike_exchange_device
    capture.install()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") then copies through the dispatcher
    torch.__future__.set_swap_module_params_on_conversion(True)
    Tensor.pin_memory, Tensor.is_pinned = lambda self, device=None: self, lambda self, device=None: True
    torch.Generator = lambda device="cpu": generator("cpu")  # draws what the CPU's would
    _flash.SDPAParams = lambda *args: args
    _flash.can_use_flash_attention = lambda params, debug=False: _choice(*params[:3], attn_mask=params[3]) == 1
    _flash.can_use_cudnn_attention = _flash.can_use_flash_attention
    _flash.can_use_efficient_attention = lambda params, debug=False: params[0].dtype != torch.float64
    Device().__enter__()


if __name__ == "__main__":
    import pytest

    sys.modules["lookalike"] = sys.modules["__main__"]
    install()
    raise SystemExit(pytest.main(sys.argv[2:]))
