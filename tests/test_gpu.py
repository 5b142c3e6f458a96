"""What only a GPU can show: no wait for the device, graphs, streams, a second device."""

import pytest
import torch
from helpers import problem

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

OPS = ("kd_loss", "ctc_loss", "ctc_kd_loss")
pytestmark = pytest.mark.parametrize("op", OPS)


def only_gpu(on):
    if on.device != "cuda" or on.backend not in ("cuda", "triton"):
        pytest.skip("of the GPU's own backends")


def test_gpu_never_waits(on, op):
    only_gpu(on)
    p = problem(seed=1).to("cuda", torch.float32)
    x, y = p.logits.detach().requires_grad_(), p.logits * 0.5
    loss_of(on, op, x, y, p.rest).backward()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_of(on, op, x, y, p.rest).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def loss_of(on, op, x, y, rest):
    if op == "kd_loss":
        return on.kd_loss(x, y)
    if op == "ctc_loss":
        return on.ctc_loss(x, *rest)
    return on.ctc_kd_loss(x, y, *rest).loss


def test_gpu_graph(on, op):
    """Captured once, replayed on other values."""
    only_gpu(on)
    p, other = (problem(seed=s, full=True).to("cuda", torch.float32) for s in (1, 2))
    x = p.logits.clone().requires_grad_()
    y = p.logits.roll(1, 0).clone()
    rest = [z.clone() for z in p.rest]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            torch.autograd.grad(loss_of(on, op, x, y, rest), x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = loss_of(on, op, x, y, rest)
        (grad,) = torch.autograd.grad(loss, x)
    for q in (other, p):
        with torch.no_grad():
            x.copy_(q.logits)
            for a, b in zip(rest, q.rest, strict=True):
                a.copy_(b)
        graph.replay()
        fresh = x.detach().clone().requires_grad_()
        expected = loss_of(on, op, fresh, y, rest)
        torch.cuda.synchronize()
        assert torch.equal(loss, expected)
        assert torch.equal(grad, torch.autograd.grad(expected, fresh)[0])


def test_gpu_stream(on, op):
    """On a stream of its own: what is launched elsewhere would read values not yet there."""
    only_gpu(on)
    p = problem(seed=3, full=True).to("cuda", torch.float32)
    y = p.logits.roll(1, 0)
    expected = loss_of(on, op, p.logits, y, p.rest)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        x = torch.zeros_like(p.logits)
        torch.cuda._sleep(50_000_000)
        x.copy_(p.logits)
        loss = loss_of(on, op, x, y, p.rest)
    torch.cuda.synchronize()
    assert torch.equal(loss, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_gpu_that_is_not_the_current_one(on, op):
    only_gpu(on)
    p = problem(seed=4, full=True).to("cuda:0", torch.float32)
    q = problem(seed=4, full=True).to("cuda:1", torch.float32)
    results = []
    for r in (p, q):
        x = r.logits.clone().requires_grad_()
        loss = loss_of(on, op, x, r.logits.roll(1, 0), r.rest)
        results.append((loss.detach().cpu(), torch.autograd.grad(loss, x)[0].cpu()))
        assert loss.device == r.logits.device
        assert torch.cuda.current_device() == 0
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
