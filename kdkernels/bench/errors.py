"""Errors of every contender against float64."""

import torch

from .contenders import EAGER, Contender, Inputs, align_table, evaluate
from .shapes import Shape

# A contender is said to differ when its loss is off by more than this, relatively, or its gradient
# relative to the largest element: a hundred times what float32 arithmetic done well gives.
DIFFERS = {"loss_relative": 1e-4, "grad_relative": 2e-3}


def errors(shape: Shape, inputs: Inputs, rivals: dict[str, Contender]) -> dict[str, dict]:
    """Name -> relative error of the summed loss, and greatest error of the gradient over its
    largest element.

    Of an alignment the loss is the summed log-probability of the best paths, without a gradient.
    """
    wide = inputs.to(torch.float64)
    if shape.op == "ctc_align":
        true_loss, true_grad = align_table()["reference"](wide)[1].sum(), None
    else:
        true_loss, true_grad = evaluate(EAGER[shape.op], wide)
    results = {}
    for name, rival in rivals.items():
        if rival.result is None:  # a copy
            continue
        loss, grad = rival.result()
        error = {"loss_relative": ((loss - true_loss) / true_loss).abs().item()}
        if grad is not None:
            off, largest = (grad - true_grad).abs().max(), true_grad.abs().max()
            error["grad_relative"] = (off / largest).item()
        results[name] = judged(**error)
    return results


def judged(**errors: float) -> dict:
    return errors | {"differs": not all(e <= DIFFERS[name] for name, e in errors.items())}
