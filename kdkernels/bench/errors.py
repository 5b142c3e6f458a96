"""Errors of every contender against float64."""

import torch

from . import peers
from .contenders import EAGER, OURS, make_inputs, separate_ctc_kd
from .shapes import Shape

# A contender is said to differ when its loss is off by more than this, relatively, or its gradient
# absolutely: a hundred times what float32 arithmetic done well gives.
DIFFERS = {"loss_relative": 1e-4, "grad_absolute": 2e-3}


def error_row(shape: Shape, names, backend=None) -> dict[str, dict]:
    """Relative error of the loss, greatest absolute one of the gradient.

    Summed losses, so that the gradient of a frame has its natural size, up to 1.
    """
    inputs = make_inputs(shape)

    def evaluate(fn, i, **kw):
        i.student.grad = None
        loss = fn(i, i.student, reduction="sum", **kw)
        loss.backward()
        return loss.detach().double(), i.student.grad.double()

    def result(name):
        if name in ("ours", "separate"):
            fn = OURS[shape.op] if name == "ours" else separate_ctc_kd
            return evaluate(fn, inputs, backend=backend)
        if name == "optax":
            return peers.optax_result(inputs, "sum")
        fn = EAGER[shape.op]
        if name == "compile":
            torch._dynamo.reset()
            fn = torch.compile(fn, dynamic=False)
        return evaluate(fn, inputs)

    true_loss, true_grad = evaluate(EAGER[shape.op], inputs.to(torch.float64))
    errors = {}
    for name in names:
        loss, grad = result(name)
        e = {
            "loss_relative": ((loss - true_loss) / true_loss).abs().item(),
            "grad_absolute": (grad - true_grad).abs().max().item(),
        }
        errors[name] = e | {"differs": not all(e[k] <= bound for k, bound in DIFFERS.items())}
    return errors
