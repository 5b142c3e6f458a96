"""The Triton kernels in the interpreter, with the tiles, lanes and groups that a GPU is given: its
own are large, since it is slow, and leave out what several vectors of states do to each other."""

import importlib

import pytest
import torch
from helpers import ctc_oracle, kd_oracle, problem, randn
from tolerances import assert_ctc_grad, assert_kd_grad, assert_loss

from kdkernels import backends

FILES = ("common", "kd_loss", "ctc_loss", "ctc_align")
OF_A_GPU = {"INTERPRETED": False, "TILE": 1 << 11, "GROUP": 1}


@pytest.fixture
def backend(monkeypatch):
    if "triton" not in backends.available("ctc_loss", "cpu"):
        pytest.skip("triton does not run on the CPU here")
    for file in FILES:
        module = importlib.import_module(f"kdkernels.backends.triton.{file}")
        for name, value in OF_A_GPU.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    return backends.load("triton")


@pytest.mark.parametrize(("S", "N"), [(3, 3), (40, 1), (64, 1)])  # 32 lanes of 1, 2, 4 labels
def test_ctc(backend, S, N):
    p = problem(T=S + S // 4 + 5, N=N, C=9, S=S, seed=S)
    logits = p.logits.float()
    expected, expected_grad = ctc_oracle(p._replace(logits=logits), "none")
    loss, grad = backend.ctc_loss_forward(logits, *p.rest, 0, "none", False, True)
    assert_loss(loss, expected, torch.float32)
    assert_ctc_grad(grad, expected_grad, torch.float32)
    if N == 1:  # the rest is the same kernels, and slow
        return
    occupancy = backend.ctc_posteriors(logits, *p.rest, 0)
    valid = torch.arange(len(logits))[:, None] < p.input_lengths
    softmax = torch.where(valid[..., None], logits.double().softmax(-1), 0.0)
    assert_ctc_grad(softmax - occupancy, expected_grad, torch.float32)
    log_p = logits.double().log_softmax(-1)
    paths, scores = backend.ctc_align(logits, *p.rest, 0)
    for n, path in enumerate(paths):
        path = path[: p.input_lengths[n]]
        kept = torch.unique_consecutive(path)
        assert kept[kept != 0].tolist() == p.targets[n, : p.target_lengths[n]].tolist()
        along = log_p[: len(path), n].gather(1, path[:, None]).sum()
        assert_loss(scores[n], along, torch.float32)
    assert (paths.ge(0) == valid.t()).all()


@pytest.mark.parametrize("C", [5, 100, 3000, 9000])
def test_kd_loss(backend, C):
    s, t = randn(7, C, seed=C).float(), randn(7, C, seed=C + 1).float()
    tail = (2.0, 2.0, "forward_kl", 0.5, "sum", True, True, True)
    loss, grad_s, grad_t = backend.kd_loss_forward(s, t, None, *tail)
    expected, expected_s, expected_t = kd_oracle(s, t, temperature=2.0, reduction="sum")
    assert_loss(loss, expected, torch.float32, kd=True)
    assert_kd_grad(grad_s, expected_s, torch.float32)
    assert_kd_grad(grad_t, expected_t, torch.float32)
