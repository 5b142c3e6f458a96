"""Errors of every contender against float64."""

import torch

from . import peers
from .contenders import EAGER, align_table, loss_table, make_inputs
from .shapes import Shape

# A contender is said to differ when its loss is off by more than this, relatively, or its gradient
# absolutely: a hundred times what float32 arithmetic done well gives.
DIFFERS = {"loss_relative": 1e-4, "grad_absolute": 2e-3}


def evaluate(loss_of, inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed loss and its gradient, in float64.

    Summed, so that the gradient of a frame has its natural size, up to 1.
    """
    inputs.student.grad = None
    loss = loss_of(inputs, inputs.student, reduction="sum")
    loss.backward()
    return loss.detach().double(), inputs.student.grad.double()


def error_row(shape: Shape, names, backend=None) -> dict[str, dict]:
    """Name -> relative error of the summed loss, greatest absolute one of the gradient."""
    inputs = make_inputs(shape)
    if shape.op == "ctc_align":
        return align_errors(inputs, names, backend)
    true_loss, true_grad = evaluate(EAGER[shape.op], inputs.to(torch.float64))
    table = loss_table(shape, backend)
    errors = {}
    for name in names:
        if name == "optax":
            loss, grad = peers.optax_result(inputs, "sum")
        else:
            loss, grad = evaluate(table[name](), inputs)
        errors[name] = judged(
            loss_relative=((loss - true_loss) / true_loss).abs().item(),
            grad_absolute=(grad - true_grad).abs().max().item(),
        )
    return errors


def align_errors(inputs, names, backend) -> dict[str, dict]:
    """Name -> relative error of the best path's summed log-probability; there is no gradient."""
    table = align_table(backend)
    true = table["reference"](inputs.to(torch.float64))[1].sum()
    return {
        name: judged(
            loss_relative=((table[name](inputs)[1].double().sum() - true) / true).abs().item()
        )
        for name in names
    }


def judged(**errors: float) -> dict:
    return errors | {"differs": not all(e <= DIFFERS[name] for name, e in errors.items())}
