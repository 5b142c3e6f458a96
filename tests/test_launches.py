"""Kernels that a training step launches, counted where they run on the host."""

import pytest
import torch
from conftest import Place
from helpers import problem, randn

from kdkernels import backends

MOST = {"kd_loss": 3, "ctc_loss": 5, "ctc_kd_loss": 5}


def step(on, op, p, upstream=1.0, **options):
    """A training step, and its results."""
    x = on.leaf(p.logits.float())
    rest = [y.to(on.device) for y in p.rest]
    if op == "ctc_loss":
        loss = on.ctc_loss(x, *rest)
    else:
        teacher = randn(*p.logits.shape, seed=2).float().to(on.device)
        if op == "kd_loss":
            loss = on.kd_loss(x, teacher, weight=torch.ones(x.shape[:2], device=on.device))
        else:
            loss = on.ctc_kd_loss(x, teacher, *rest).loss
    (loss * upstream).backward()
    return loss.detach(), x.grad


def launches_emulated(monkeypatch, function):
    import kdkernels_emulated

    before = kdkernels_emulated.launches()
    function()
    return kdkernels_emulated.launches() - before


def launches_triton(monkeypatch, function):
    from triton.runtime.interpreter import GridExecutor

    calls = []
    run = GridExecutor.__call__

    def counted(self, *args, **kwargs):
        calls.append(self)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", counted)
    function()
    return len(calls)


COUNTERS = {"cuda_emulated": launches_emulated, "triton": launches_triton}


@pytest.mark.parametrize("op", MOST)
@pytest.mark.parametrize("upstream", [1.0, 3.0])
@pytest.mark.parametrize("name", COUNTERS)
def test_kernels_of_a_step(op, upstream, name, monkeypatch):
    if name not in backends.available(op, "cpu"):
        pytest.skip(f"{name} does not run on the CPU here")
    on, p = Place("cpu", name), problem(T=12, seed=1)
    count = COUNTERS[name](monkeypatch, lambda: step(on, op, p, upstream))
    assert 1 < count <= MOST[op]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("nothing", None),
        ("unwritten", "before it is written"),
        ("bounds", "index 64 of 64"),
        ("missed barrier", "wait where others never come"),
        ("missed exchange", "wait where others never come"),
        ("two barriers", "at different barriers"),
        ("no barrier", "without a barrier|before it is written"),
        ("warp barrier alone", "without a barrier|before it is written"),
        ("overwritten", "without a barrier"),
        ("written twice", "written without a barrier after another thread wrote it"),
    ],
)
def test_the_emulation_sees_misuse(what, message):
    kdkernels_emulated = pytest.importorskip("kdkernels_emulated")
    if message is None:
        kdkernels_emulated.misuse(what)
    else:
        with pytest.raises(RuntimeError, match=message):
            kdkernels_emulated.misuse(what)
