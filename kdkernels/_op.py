"""What makes a fused loss an operator: one autograd node in eager mode, torch.library under
torch.compile.

The gradient is made in the forward call, and backward hands it over: nothing of the size of the
logits is stored but that gradient. In eager mode a registered operator would cost three times the
call, so one is used only where torch.compile needs it to be opaque.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.autograd import forward_ad

from . import backends


def call(op, tensors, options, wanted, backend):
    """Run a loss operator: a tuple of losses, the first of which can be differentiated.

    `tensors` begins with the logits, one for each flag of `wanted`, which says what gradients to
    make.
    """
    if is_traced(*tensors):
        outputs = getattr(torch.ops.kdkernels, op)(*tensors, *options, *wanted, backend)
        return outputs[: -len(wanted)]
    if torch.jit.is_tracing():  # it would keep the numbers of this call
        raise RuntimeError(
            f"{op}: cannot be traced by torch.jit; use torch.compile or torch.export"
        )
    call = _Call(op, *backends.select_loss(op, tensors[0].device.type, backend), options, wanted)
    if True in wanted or forward_ad._current_level >= 0:  # of which it says that it has none
        return _Fused.apply(call, *map(_savable, tensors))
    return call.function(*tensors, *options, *wanted)[: -len(wanted)]


def wants_grad(x):
    return x.requires_grad and torch.is_grad_enabled()


_PLAIN = torch.Tensor.__torch_dispatch__
_FUNCTIONALIZE = torch._C._functorch.TransformType.Functionalize


def is_traced(*tensors):
    """Whether torch must see an operator and not memory, which there may not be: torch.compile, a
    mode that looks at operators (FakeTensorMode, make_fx), torch.func.functionalize, tensors that
    stand for others (DTensor)."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return True
    transform = torch._C._functorch.peek_interpreter_stack()
    stands_for_others = transform is not None and transform.key() == _FUNCTIONALIZE
    for x in tensors:  # any() takes five times as long
        stands_for_others |= x is not None and type(x).__torch_dispatch__ is not _PLAIN
    return stands_for_others


def _savable(x):
    """`x` as autograd saves it, which refuses what was made in inference mode: the same memory."""
    if x is None or not x.is_inference():
        return x
    return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())


class _Call(NamedTuple):
    op: str
    function: Callable
    scale_grad_: Callable  # of the same backend
    options: tuple
    wanted: tuple[bool, ...]


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call, *tensors):
        _, function, _, options, wanted = call
        outputs = function(*tensors, *options, *wanted)
        losses = outputs[: -len(wanted)]
        ctx.call, ctx.grads = call, outputs[-len(wanted) :]
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        if len(losses) > 1:
            ctx.mark_non_differentiable(*losses[1:])
        return losses

    @staticmethod
    def backward(ctx, grad_loss, *_):
        needed = ctx.needs_input_grad
        results = [None] * len(needed)
        if grad_loss is None:
            return tuple(results)
        op, function, scale_grad_, options, wanted = ctx.call
        grads, ctx.grads = ctx.grads, None
        if grads is None:  # a graph that was kept: what was handed out is never touched again
            with torch.no_grad():
                grads = function(*ctx.saved_tensors, *options, *wanted)[-len(wanted) :]
        factor = grad_loss.detach()
        for i, grad in enumerate(grads, 1):  # 0 is the call
            if grad is not None and needed[i]:
                results[i] = scale_grad_(grad, factor)
        if torch.is_grad_enabled():
            results = [
                g if g is None else _Once.apply(op, g, grad_loss, *ctx.saved_tensors)
                for g in results
            ]
        return tuple(results)


class _Once(torch.autograd.Function):
    """The gradient, tied to all it depends on, so that differentiating it again is an error."""

    @staticmethod
    def forward(ctx, op, grad, *inputs):
        ctx.op = op
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, *_):
        raise _second_derivative(ctx.op)


def _second_derivative(op):
    return RuntimeError(f"{op}: expected to be differentiated once, got a second derivative")


# ------------------------------------------------------------------------------------ torch.compile


def define_plain(op, schema, fake, arrive):
    """Register `kdkernels::op`, an operator without a derivative."""

    def body(*args):
        *args, backend = args
        return backends.select(op, args[0].device.type, backend)(*arrive(*args))

    torch.library.custom_op(f"kdkernels::{op}", body, mutates_args=(), schema=schema).register_fake(
        fake
    )


def define(op, schema, fake_losses, *, arrive=None, n_logits=1):
    """Register `kdkernels::op`, the same body as in eager mode, with its fake kernel and its
    derivative.

    The schema is that of the backend's function with `backend` after it. `arrive(*args)` gives the
    arguments, checked and on one device, `fake_losses(*args)` empty losses; gradients, one for each
    of the first `n_logits` arguments, have the layout of their logits, and no element where they
    are not asked for.
    """
    n_losses = schema.split("->")[1].count("Tensor") - n_logits

    def body(*args):
        *args, backend = args
        if arrive is not None:
            args = arrive(*args)
        outputs = backends.select(op, args[0].device.type, backend)(*args)
        grads = outputs[n_losses:]
        return (*outputs[:n_losses], *(_laid_out(g, x) for g, x in zip(grads, args, strict=False)))

    def fake(*args):
        losses = fake_losses(*args[:-1])
        wanted = args[-1 - n_logits : -1]
        grads = (
            torch.empty_like(x) if w else x.new_empty(0)
            for x, w in zip(args[:n_logits], wanted, strict=True)
        )
        return (*losses, *grads)

    def setup_context(ctx, inputs, output):
        ctx.n_inputs = len(inputs)
        ctx.wanted = inputs[-1 - n_logits : -1]
        ctx.save_for_backward(*output[n_losses:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    def backward(ctx, grad_loss, *_):
        results = [None] * ctx.n_inputs
        if grad_loss is None:
            return tuple(results)
        if torch.is_grad_enabled():
            raise _second_derivative(op)
        for i, (grad, wanted) in enumerate(zip(ctx.saved_tensors, ctx.wanted, strict=True)):
            if wanted:
                results[i] = (grad * grad_loss.unsqueeze(-1)).to(grad.dtype)
        return tuple(results)

    operator = torch.library.custom_op(f"kdkernels::{op}", body, mutates_args=(), schema=schema)
    operator.register_fake(fake)
    operator.register_autograd(backward, setup_context=setup_context)


def _laid_out(grad, logits):
    if grad is None:
        return logits.new_empty(0)
    strides = torch.empty_like(logits, device="meta").stride()
    if grad.stride() == strides:
        return grad
    return torch.empty_strided(grad.shape, strides, dtype=grad.dtype, device=grad.device).copy_(
        grad
    )
