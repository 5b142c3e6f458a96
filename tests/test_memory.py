"""Memory of gradients on the CPU: kept from one step for the next, and written past the caches."""

import os
import threading

import pytest
import torch

import kdkernels as kd
from kdkernels import _memory

pytestmark = pytest.mark.skipif(
    "cpp" not in kd.available("kd_loss") or not _memory.keeps(2**30),
    reason="memory is kept by the compiled backend, on Linux",
)

T, N, C, S = 12, 3, 7, 4


@pytest.fixture(autouse=True)
def _kept(monkeypatch):
    """Of every size, and nothing that another test has left."""
    monkeypatch.setattr(_memory, "SMALLEST", 1)
    kd.empty_cache()
    yield
    kd.empty_cache()


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def poison():
    for block in _memory._free:
        block[:] = b"\xff" * len(block)  # NaN in every dtype


def blocks():
    return sorted(len(block) for block in _memory._free)


def kd_grad(x, **options):
    x = x.detach().requires_grad_()
    kd.kd_loss(x, randn(*x.shape, seed=1).to(x.dtype), backend="cpp", **options).backward()
    return x.grad


def ctc_grad(x, **options):
    targets = torch.tensor([[1, 2, 2, 3], [4, 5, 1, 1], [6, 6, 6, 6]])
    lengths = torch.tensor([T, T - 5, 5]), torch.tensor([S, 2, S])  # the last cannot be aligned
    x = x.detach().requires_grad_()
    kd.ctc_loss(x, targets, *lengths, reduction="sum", backend="cpp", **options).backward()
    return x.grad


def ctc_kd_grad(x):
    targets, lengths = torch.tensor([[1, 2, 3, 4]] * N), torch.tensor([T, T - 5, 0])
    teacher = randn(*x.shape, seed=1).requires_grad_()
    x = x.detach().requires_grad_()
    labelled = torch.tensor([True, False, True])
    kd.ctc_kd_loss(
        x, teacher, targets, lengths, torch.tensor([S, S, 0]), labelled=labelled, backend="cpp"
    ).loss.backward()
    return torch.cat([x.grad, teacher.grad])


WEIGHT = torch.tensor([1.0, 0, 2, 0, 0, 1])
GRADIENTS = {
    "kd_loss": lambda: kd_grad(randn(6, C)),
    "kd_loss, rows of weight 0": lambda: kd_grad(randn(6, C), weight=WEIGHT),
    "kd_loss, float64": lambda: kd_grad(randn(6, C).double()),
    "kd_loss, bfloat16": lambda: kd_grad(randn(6, C).bfloat16()),
    "kd_loss, columns of a wider tensor": lambda: kd_grad(randn(6, 2 * C)[:, :C]),
    "kd_loss, permuted": lambda: kd_grad(randn(2, 3, C).transpose(0, 1)),
    "kd_loss, rows that overlap": lambda: kd_grad(randn(9).unfold(0, 5, 1)),
    "ctc_loss": lambda: ctc_grad(randn(T, N, C)),
    "ctc_loss, batch first": lambda: ctc_grad(randn(N, T, C), batch_first=True),
    "ctc_kd_loss": lambda: ctc_kd_grad(randn(T, N, C)),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_what_was_there_does_not_show(name):
    gradient = GRADIENTS[name]
    with _memory.left_to_torch():
        expected = gradient()
    assert not blocks()
    for _ in range(3):
        grad = gradient()
        assert torch.equal(grad, expected)
        assert grad.stride() == expected.stride()
        del grad
        assert blocks()
        poison()


def test_the_memory_of_a_gradient_serves_the_next():
    grad = kd_grad(randn(6, C))
    at = grad.data_ptr()
    del grad
    assert kd_grad(randn(6, C), temperature=2.0).data_ptr() == at


def test_a_gradient_in_use_is_not_touched():
    first = kd_grad(randn(6, C))
    values, at = first.clone(), first.data_ptr()
    rows = first[2:4].numpy()
    del first
    second = kd_grad(randn(6, C, seed=5))
    assert second.data_ptr() != at
    assert (rows == values[2:4].numpy()).all()
    del rows
    assert kd_grad(randn(6, C)).data_ptr() == at


def test_backward_hands_the_gradient_over_without_a_copy(monkeypatch):
    made, empty = [], _memory.empty

    def noted(*args):
        gradient = empty(*args)
        made.append(gradient.data_ptr())
        return gradient

    monkeypatch.setattr(_memory, "empty", noted)
    grad = kd_grad(randn(6, C))
    assert made == [grad.data_ptr()]
    assert grad._base is None


def test_blocks_are_as_many_as_were_in_use_at_once():
    page = _memory.HUGE_PAGE
    C = page // 4
    for rows in (1, 2, 3, 2, 5):
        kd_grad(randn(rows, C))
    assert blocks() == [5 * page]
    grads = [kd_grad(randn(rows, C)) for rows in (3, 4)]
    assert not blocks()  # the least that would do, which was the large one, and a new one
    del grads
    assert blocks() == [4 * page, 5 * page]
    grads = [kd_grad(randn(1, 5)) for _ in range(_memory.KEPT + 3)]
    del grads
    assert len(blocks()) == _memory.KEPT


def test_the_smallest_that_will_do_is_taken():
    page = _memory.HUGE_PAGE
    grads = [kd_grad(randn(rows, page // 4)) for rows in (4, 1, 2)]
    at = [g.data_ptr() for g in grads]
    del grads
    assert kd_grad(randn(2, page // 4)).data_ptr() == at[2]


def test_a_small_gradient_holds_no_large_block():
    C = _memory.HUGE_PAGE // 4
    held = []
    for _ in range(3):
        kd_grad(randn(9, C))
        held.append(kd_grad(randn(1, 5)))
    assert blocks() == [9 * _memory.HUGE_PAGE]


def test_without_memory_what_is_kept_is_given_up_and_torch_asked(monkeypatch):
    expected = kd_grad(randn(6, C))
    kd_grad(randn(6, C))
    assert blocks()
    huge = _memory.mmap.mmap

    def full(*args, **options):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(_memory.mmap, "mmap", full)
    again = kd_grad(randn(6, C))  # in what was kept
    assert torch.equal(kd_grad(randn(6, C)), expected)
    assert not blocks()
    monkeypatch.setattr(_memory.mmap, "mmap", huge)
    assert torch.equal(again, expected)


def test_empty_cache_gives_what_is_free_back():
    grad = kd_grad(randn(6, C))
    expected = grad.clone()
    kd_grad(randn(6, C))
    assert len(blocks()) == 1
    kd.empty_cache()
    assert not blocks()
    assert torch.equal(grad, expected)
    del grad
    assert len(blocks()) == 1


def test_large_blocks_may_be_taken_by_the_system(monkeypatch):
    """What it took is zeros when it is read again: of a gradient nothing is, before it is made."""
    monkeypatch.setattr(_memory, "RECLAIMABLE", 1)
    expected = kd_grad(randn(600, C)).clone()
    assert torch.equal(kd_grad(randn(600, C)), expected)


def test_small_gradients_are_torchs(monkeypatch):
    monkeypatch.setattr(_memory, "SMALLEST", 2**20)
    kd_grad(randn(6, C))
    assert not blocks()


def test_threads_share_what_is_kept():
    inputs = [randn(64, C, seed=i) for i in range(8)]
    expected = [kd_grad(x).clone() for x in inputs]
    wrong = []

    def work(i):
        wrong.extend(i for _ in range(200) if not torch.equal(kd_grad(inputs[i]), expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(blocks()) <= _memory.KEPT


def test_a_gradient_is_saved_and_shared(tmp_path):
    grad = kd_grad(randn(6, C))
    expected = grad.clone()
    torch.save(grad, tmp_path / "grad.pt")
    assert os.path.getsize(tmp_path / "grad.pt") < 10_000  # not the block
    assert torch.equal(torch.load(tmp_path / "grad.pt"), expected)
    assert torch.equal(grad.share_memory_(), expected)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_process_has_its_own():
    grad = kd_grad(randn(6, C))
    expected = grad.clone()
    kd_grad(randn(6, C))
    child = os.fork()
    if child == 0:  # no more than this: torch's threads are not there
        grad.fill_(7)
        for block in _memory._free:
            block[:] = b"\0" * len(block)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(grad, expected)
    assert torch.equal(kd_grad(randn(6, C)), expected)


# ------------------------------------------------ past the caches, into pages that were used before


@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (2.0, 1.0)])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_rows_alone_and_in_a_tensor_larger_than_the_caches(divergence, temperatures):
    t = randn(6500, 1003, seed=18)
    s = t + randn(6500, 1003, seed=19) * torch.logspace(-3, 1, 6500)[:, None]

    def results(rows):
        x, y = (z[rows].clone().requires_grad_() for z in (s, t))
        loss = kd.kd_loss(
            x, y, temperature=temperatures[0], teacher_temperature=temperatures[1],
            reduction="none", divergence=divergence, backend="cpp",
        )  # fmt: skip
        return loss.detach(), *torch.autograd.grad(loss.sum(), (x, y))

    first = [x.clone() for x in results(slice(None))]  # in new pages, not past the caches
    poison()
    again = results(slice(None))
    few = zip(*(results(slice(i, i + 500)) for i in range(0, 6500, 500)), strict=True)
    for new, whole, parts in zip(first, again, few, strict=True):
        assert torch.equal(whole, torch.cat(parts))
        assert torch.equal(whole, new)
        assert whole.isfinite().all()  # no element was left as it was


@pytest.mark.parametrize("with_teacher", [False, True])
def test_utterances_alone_and_in_a_tensor_larger_than_the_caches(with_teacher):
    T, N, C, S = 40, 16, 10007, 8
    logits, teacher = randn(T, N, C, seed=20), randn(T, N, C, seed=21)
    targets = torch.randint(1, C, (N, S), generator=torch.Generator().manual_seed(22))
    targets[3] = 5  # cannot be aligned in so few frames
    lengths = torch.full((N,), T), torch.full((N,), S)
    lengths[0][2:4] = torch.tensor([17, S])

    def gradient(n):
        x = logits[:, n].clone().requires_grad_()
        rest = targets[n], lengths[0][n], lengths[1][n]
        options = {"reduction": "sum", "zero_infinity": True, "backend": "cpp"}
        if with_teacher:
            loss = kd.ctc_kd_loss(x, teacher[:, n], *rest, **options).loss
        else:
            loss = kd.ctc_loss(x, *rest, **options)
        return torch.autograd.grad(loss, x)[0]

    first = gradient(slice(None)).clone()
    poison()
    whole = gradient(slice(None))
    assert torch.equal(whole, first)
    assert whole.isfinite().all()
    for n in (0, 2, 3, N - 1):
        assert torch.equal(whole[:, n : n + 1], gradient(slice(n, n + 1)))
