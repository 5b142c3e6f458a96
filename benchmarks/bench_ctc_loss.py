"""ctc_loss, forward and backward: `pytest benchmarks/bench_ctc_loss.py`."""

import pytest

OP = "ctc_loss"


@pytest.mark.parametrize("name", ["ours", "new", "eager", "optax", "k2", "copy"])
def bench_ctc_loss(run, name):
    run(name)
