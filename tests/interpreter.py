"""Triton's interpreter, made fit for a test suite: numpy 2.4, no warnings, no time lost."""

import types

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def _call(function, *args, **kwargs):
    """A device function inside a kernel: the language was patched when the kernel was launched."""
    return function.rewrite()(*args, **kwargs)


def _patched(patch):
    def with_index(tensor, scope):
        patch(tensor, scope)
        # The original converts an array of one element, which numpy 2.4 refuses.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return with_index


_convert_float = interpreter._convert_float


def _converted(x, source, target, rounding):
    """The original loses the carry when it rounds to bfloat16."""
    if source == tl.float32 and target == tl.bfloat16:
        return torch.from_numpy(np.array(x)).bfloat16().view(torch.int16).numpy().view(np.uint16)
    return _convert_float(x, source, target, rounding)


def _compared(compare):
    """The original says that the outcome has the type of what was compared."""
    return lambda *args: interpreter.TensorHandle(compare(*args).data, tl.int1)


def prepare():
    np.seterr(all="ignore")  # -inf - -inf is nan, on a GPU in silence
    interpreter.InterpretedFunction.__call__ = _call
    interpreter._convert_float = _converted
    builder = interpreter.InterpreterBuilder
    for name in dir(builder):
        if name.startswith(("create_fcmp", "create_icmp")):
            setattr(builder, name, _compared(getattr(builder, name)))
    everything = types.FunctionType(prepare.__code__, {"tl": tl, "core": tl.core})
    patch_lang = interpreter._patch_lang
    interpreter._patch_lang = lambda _: patch_lang(everything)
    interpreter._patch_lang_tensor = _patched(interpreter._patch_lang_tensor)
