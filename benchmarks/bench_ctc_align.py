"""ctc_align, the call: `pytest benchmarks/bench_ctc_align.py`."""

import pytest

OP = "ctc_align"


@pytest.mark.parametrize("name", ["ours", "reference", "torchaudio", "copy"])
def bench_ctc_align(run, name):
    run(name)
