"""Options of the pytest-benchmark files."""

import os

import pytest
import torch


def pytest_configure(config):
    from kdkernels import available

    if "cpp" not in available("kd_loss") and not os.environ.get("KDKERNELS_BACKEND"):
        raise pytest.UsageError(
            "the compiled extension is not here, plain torch would be measured as this package: "
            "pip install -e . or set KDKERNELS_BACKEND=reference"
        )


def pytest_addoption(parser):
    parser.addoption(
        "--tiny", action="store_true", help="tiny shapes: try the files, measure nothing"
    )
    parser.addoption("--threads", type=int, default=torch.get_num_threads(), help="torch threads")


def pytest_generate_tests(metafunc):
    from kdkernels.bench.shapes import select

    op = getattr(metafunc.module, "OP", None)
    if "shape" in metafunc.fixturenames:
        shapes = select(op, metafunc.config.getoption("tiny"))
        metafunc.parametrize("shape", shapes, ids=lambda s: s.label)


@pytest.fixture(autouse=True)
def _threads(request):
    torch.set_num_threads(request.config.getoption("threads"))


@pytest.fixture
def run(benchmark, shape):
    """Time one contender of one shape; contenders of a shape form a group."""
    from kdkernels.bench import peers
    from kdkernels.bench.contenders import contenders, make_inputs

    def run(name):
        rivals = contenders(shape, make_inputs(shape), only=(name,))
        if name not in rivals:
            if name == "new":
                pytest.skip("of so small a gradient no memory is kept")
            pytest.skip(f"{name} does not run here: {peers.status()[name]['why_not']}")
        step = rivals[name].step
        benchmark.group = f"{shape.op} {shape.label}"
        benchmark.extra_info["logit_bytes"] = 4 * shape.numel
        benchmark.pedantic(step, rounds=20, warmup_rounds=3)

    return run
