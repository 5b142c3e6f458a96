"""The list of backends, best first, and the choice among them.

A backend is a module of this package with functions of fixed names (the values of FUNCTIONS, or
some of them; their arguments are those of ``reference``), ``supports(device_type)`` and, for the
backward pass of its losses, ``scale_grad_(grad, grad_loss)``: the gradient made in forward, times
what comes in. A new backend is one module, one word in NAMES and, where it needs a module that may
be missing, one line in REQUIRES.
"""

import functools
import importlib
import os
import warnings

import torch

NAMES = ("cuda", "cpp", "triton", "reference")

# What must be importable for a backend to exist here. The absence of this very module makes the
# backend absent; anything else that goes wrong while it loads (a missing symbol, another missing
# module) is an error, because a broken build must never turn into a silent slow path.
REQUIRES = {"cuda": "kdkernels._C", "cpp": "kdkernels._C", "triton": "triton"}

FUNCTIONS = {
    "kd_loss": "kd_loss_forward",
    "ctc_loss": "ctc_loss_forward",
    "ctc_kd_loss": "ctc_kd_loss_forward",
    "ctc_posteriors": "ctc_posteriors",
    "ctc_align": "ctc_align",
}

_environ = os.environ


@functools.cache
def load(name):
    """The backend's module, or None where what it requires is not installed."""
    required = REQUIRES.get(name)
    if required is not None:
        try:
            importlib.import_module(required)
        except ModuleNotFoundError as error:
            if error.name != required:
                raise
            return None
    return importlib.import_module(f"{__name__}.{name}")


def available(op: str, device_type: str | torch.device = "cpu") -> list[str]:
    """Names of the backends that run `op` on `device_type` on this machine, best first.

    `device_type` may also be a device: ``"cuda:0"`` or ``logits.device``.
    """
    if op not in FUNCTIONS:
        raise ValueError(f"available: expected `op` in {sorted(FUNCTIONS)}, got {op!r}")
    try:
        device_type = torch.device(device_type).type
    except (RuntimeError, TypeError):
        raise ValueError(
            f"available: expected `device_type` to be a device, got {device_type!r}"
        ) from None
    modules = ((name, load(name)) for name in NAMES)
    return [name for name, module in modules if module and _runs(module, op, device_type)]


def _runs(module, op, device_type):
    return hasattr(module, FUNCTIONS[op]) and module.supports(device_type)


def select(op, device_type, backend=None):
    """The function that runs `op`: of `backend`, else of KDKERNELS_BACKEND, else of the best one
    there is."""
    return select_loss(op, device_type, backend)[0]


def select_loss(op, device_type, backend=None):
    """(the function that runs `op`, ``scale_grad_`` of the same backend)"""
    if not backend and (named := _environ.get("KDKERNELS_BACKEND")):
        if named not in NAMES:
            raise ValueError(f"{op}: expected KDKERNELS_BACKEND in {list(NAMES)}, got {named!r}")
        backend = named
    return _resolve(op, device_type, backend or None)


@functools.cache
def _resolve(op, device_type, backend):
    if backend is None:
        for name in NAMES:  # no further than the first that will do: the others are not imported
            module = load(name)
            if module and _runs(module, op, device_type):
                if device_type == "cpu" and load("cpp") is None:
                    warnings.warn(
                        f"{op}: kdkernels has no compiled extension here, so that backend "
                        f"{name!r} runs, which is slow. Was it installed, and is this the folder "
                        f"of its sources? There, an editable install has one: pip install -e .",
                        stacklevel=2,
                    )
                return getattr(module, FUNCTIONS[op]), module.scale_grad_
        raise NotImplementedError(f"{op}: no backend runs on device type {device_type!r}")
    if backend not in NAMES:
        raise ValueError(f"{op}: expected `backend` in {list(NAMES)}, got {backend!r}")
    module = load(backend)
    if module is None:
        raise ValueError(
            f"{op}: expected `backend` to be one of {available(op, device_type)}, got {backend!r}: "
            f"module {REQUIRES[backend]} is not installed"
        )
    if not _runs(module, op, device_type):
        raise ValueError(
            f"{op}: expected `backend` to be one of {available(op, device_type)} on device type "
            f"{device_type!r}, got {backend!r}"
        )
    return getattr(module, FUNCTIONS[op]), module.scale_grad_
