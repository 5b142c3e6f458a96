"""Which (device, backend) pairs there must be, and how a backend is chosen."""

import importlib
import os
import sys

import pytest
import torch

import kdkernels as kd
from kdkernels import backends

OPERATORS = ("kd_loss", "ctc_loss", "ctc_kd_loss", "ctc_posteriors", "ctc_align")


@pytest.fixture
def fresh(monkeypatch):
    """The choice of backends without its memory, before and after."""
    backends.load.cache_clear()
    backends._resolve.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    backends.load.cache_clear()
    backends._resolve.cache_clear()


@pytest.mark.parametrize("op", OPERATORS)
def test_pairs_that_must_exist(op):
    interpreted = ["triton"] if os.environ.get("TRITON_INTERPRET") == "1" else []
    assert kd.available(op, "cpu") == ["cpp", *interpreted, "reference", "cuda_emulated"]
    if torch.cuda.is_available():
        assert {"triton", "reference"} <= set(kd.available(op, "cuda"))


@pytest.mark.parametrize("device", ["cpu:0", torch.device("cpu"), torch.zeros(1).device], ids=repr)
def test_available_takes_a_device(device):
    assert kd.available("kd_loss", device) == kd.available("kd_loss", "cpu")


def test_import_needs_torch_alone():
    code = "import sys, kdkernels; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    modules = _python(code).split()
    assert not {"numpy", "triton", "soundfile", "tqdm", "hypothesis"} & (
        set(modules) - set(_python(code.replace("kdkernels", "torch")).split())
    )


def test_nothing_is_loaded_at_import():
    code = "import sys, kdkernels; print([m for m in sys.modules if 'kdkernels.backends.' in m])"
    assert _python(code).strip() == "[]"


def _python(code):
    import subprocess

    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout


def test_unknown_names_are_refused():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"kd_loss: expected `backend` in .*, got 'fastest'"):
        kd.kd_loss(x, x, backend="fastest")
    with pytest.raises(ValueError, match=r"available: expected `op` in"):
        kd.available("mse_loss")
    with pytest.raises(ValueError, match=r"available: expected `device_type` to be a device, got"):
        kd.available("kd_loss", "cpp")


def test_environment_variable_is_the_default(monkeypatch):
    reference = importlib.import_module("kdkernels.backends.reference")
    monkeypatch.setenv("KDKERNELS_BACKEND", "reference")
    assert backends.select("kd_loss", "cpu") is reference.kd_loss_forward
    monkeypatch.setenv("KDKERNELS_BACKEND", "")
    best = backends.load(kd.available("kd_loss", "cpu")[0])
    assert backends.select("kd_loss", "cpu") is best.kd_loss_forward
    monkeypatch.setenv("KDKERNELS_BACKEND", "fastest")
    with pytest.raises(ValueError, match="got 'fastest'"):
        backends.select("kd_loss", "cpu")
    assert backends.select("kd_loss", "cpu", "reference") is reference.kd_loss_forward


def _failing_import(name, error):
    import_module = importlib.import_module

    def fail(module, *args):
        if module == name:
            raise error
        return import_module(module, *args)

    return fail


def test_absent_extension_makes_the_backend_absent(fresh):
    missing = ModuleNotFoundError("No module named 'kdkernels._C'", name="kdkernels._C")
    fresh.setattr(importlib, "import_module", _failing_import("kdkernels._C", missing))
    assert "cpp" not in kd.available("kd_loss", "cpu")
    x = torch.zeros(2, 3)
    with pytest.warns(UserWarning, match="no compiled extension here"):
        assert kd.kd_loss(x, x) == 0
    with pytest.raises(ValueError, match=r"kdkernels\._C is not installed"):
        kd.kd_loss(x, x, backend="cpp")


@pytest.mark.parametrize(
    "error",
    [
        ImportError("undefined symbol: kd_loss_forward"),
        ModuleNotFoundError("No module named 'ninja'", name="ninja"),
        OSError("cannot load"),
    ],
)
@pytest.mark.parametrize("module", ["kdkernels._C", "kdkernels.backends.cpp"])
def test_broken_backend_is_an_error(fresh, module, error):
    fresh.setitem(backends.REQUIRES, "cpp", "kdkernels._C")
    real = importlib.import_module

    def broken(name, *args):
        if name == module:
            raise error
        return object() if name == "kdkernels._C" else real(name, *args)

    fresh.setattr(importlib, "import_module", broken)
    with pytest.raises(type(error), match=str(error)):
        kd.available("kd_loss", "cpu")


def test_a_backend_that_does_not_run_on_the_device_is_refused(fresh):
    reference = importlib.import_module("kdkernels.backends.reference")
    fresh.setattr(reference, "supports", lambda device_type: device_type == "cuda")
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"on device type 'cpu', got 'reference'"):
        kd.kd_loss(x, x, backend="reference")


def test_a_backend_need_not_have_every_operator(fresh):
    best = backends.load("cpp")
    fresh.delattr(best, "ctc_align")
    assert "cpp" in kd.available("ctc_loss", "cpu")
    assert "cpp" not in kd.available("ctc_align", "cpu")
    with pytest.raises(ValueError, match=r"expected `backend` to be one of .*, got 'cpp'"):
        backends.select("ctc_align", "cpu", "cpp")
