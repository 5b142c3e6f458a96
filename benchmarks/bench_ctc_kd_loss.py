"""ctc_kd_loss, forward and backward: `pytest benchmarks/bench_ctc_kd_loss.py`."""

import pytest

OP = "ctc_kd_loss"


@pytest.mark.parametrize("name", ["ours", "new", "eager", "separate", "copy"])
def bench_ctc_kd_loss(run, name):
    run(name)
