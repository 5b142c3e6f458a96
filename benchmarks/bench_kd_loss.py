"""kd_loss, forward and backward: `pytest benchmarks/bench_kd_loss.py`."""

import pytest

OP = "kd_loss"
# torch.compile warns about parts of torch itself
COMPILE = pytest.param("compile", marks=pytest.mark.filterwarnings("ignore::DeprecationWarning"))


@pytest.mark.parametrize("name", ["ours", "new", "eager", COMPILE, "trl", "liger", "fla", "copy"])
def bench_kd_loss(run, name):
    run(name)
