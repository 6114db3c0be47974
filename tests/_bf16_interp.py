"""bfloat16 that is right under ``TRITON_INTERPRET=1``: Triton's interpreter (3.6 to 3.9) holds it as raw uint16 bits.

Three repairs, none of which a GPU needs: ``tl.dot`` widens both sides to float32 (exact: tensor cores do the same with float32
accumulation), float32 -> bfloat16 rounds to nearest even instead of truncating, and any other arithmetic on bfloat16 raises, because
numpy would add or compare the bit patterns. Kernels therefore write ``.to(tl.float32)`` right after each load.
"""

import os

_ARITHMETIC = [
    *("fadd", "fsub", "fmul", "fdiv", "frem", "fneg", "fma", "precise_divf", "approx_divf", "clampf"),
    *("minimumf", "minnumf", "maximumf", "maxnumf", "floor", "ceil"),
    *("exp", "exp2", "log", "log2", "sqrt", "precise_sqrt", "rsqrt", "sin", "cos", "erf"),
    *(f"fcmp{order}{test}" for order in "OU" for test in ("LT", "GT", "LE", "GE", "EQ", "NE")),
]


def install() -> bool:
    """Patch the interpreter, once; True where it is in use."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return False
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    if getattr(builder, "_rounds_bf16", False):
        return True

    def is_bf16(handle) -> bool:
        return isinstance(handle, interpreter.TensorHandle) and handle.dtype.scalar == tl.bfloat16

    plain_dot, plain_cast = builder.create_dot, builder.cast_impl

    def create_dot(self, a, b, d, *rest):
        a, b = (self.cast_impl(t, tl.float32) if is_bf16(t) else t for t in (a, b))
        return plain_dot(self, a, b, d, *rest)

    def cast_impl(self, src, dst):
        if src.dtype.scalar != tl.float32 or dst.scalar != tl.bfloat16:
            return plain_cast(self, src, dst)
        bits = np.ascontiguousarray(src.data, np.float32).view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        return interpreter.TensorHandle(np.where(np.isnan(src.data), np.uint16(0x7FC0), rounded.astype(np.uint16)), tl.bfloat16)

    def refuse(owner, name, handle_of=lambda argument: argument):
        plain = getattr(owner, name, None)
        if plain is None:  # not in this version of Triton
            return

        def checked(self, *args, **kwargs):
            if any(is_bf16(handle_of(argument)) for argument in args):
                raise TypeError(f"{name} on bfloat16 is wrong in Triton's interpreter: cast to tl.float32 right after the load")
            return plain(self, *args, **kwargs)

        setattr(owner, name, checked)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl
    for operation in _ARITHMETIC:
        refuse(builder, f"create_{operation}")
    refuse(interpreter.ReduceOps, "sum", lambda argument: getattr(argument, "handle", None))
    builder._rounds_bf16 = True
    return True
