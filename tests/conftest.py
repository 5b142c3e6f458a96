"""Every test of an operator runs over every (device, backend) pair of this machine.

A test asks for `on`, and runs an operator as ``on.ctc_loss(...)`` on ``on.device``. Its module
names in OPS the operators it needs. `test_backends.py` says which pairs must be there.
"""

import functools
import os
import random
import sys

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch

import kdkernels
from kdkernels import backends

sys.path.insert(0, os.path.dirname(__file__))

# The sanitizers look at the C++ core alone.
SANITIZED = "asan" in os.environ.get("LD_PRELOAD", "")
if not SANITIZED and os.environ.get("KDKERNELS_EMULATION") != "0":  # 0: benchmarks/gpu.py
    import cuda_emulation

    cuda_emulation.register()

# Without a GPU the Triton kernels are interpreted; it must be said before triton is imported.
INTERPRETED = not torch.cuda.is_available() and sys.platform == "linux" and not SANITIZED
if INTERPRETED:
    os.environ["TRITON_INTERPRET"] = "1"
    import interpreter

    interpreter.prepare()

torch.use_deterministic_algorithms(True)  # besides: torch.empty is NaN
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else a GPU's matmul is an error then
os.environ.pop("KDKERNELS_BACKEND", None)

hypothesis.settings.register_profile(
    "kdkernels",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=40,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("kdkernels")

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


class Place:
    """A device and a backend; its attributes are the operators, run there."""

    def __init__(self, device, backend):
        self.device, self.backend = device, backend

    @property
    def slow(self):
        """A loop over frames in Python: long problems would teach nothing about it."""
        return self.backend == "reference" or is_interpreted(self)

    def gradcheck(self, loss, leaves):
        """torch's gradcheck; along a random direction where every call takes a second."""
        return torch.autograd.gradcheck(loss, leaves, fast_mode=is_interpreted(self))

    def any_example(self, check):
        """check(self, data) for what hypothesis draws; of fewer examples where calls are slow."""
        examples = hypothesis.given(data=st.data())(lambda data: check(self, data))
        if is_interpreted(self):
            examples = hypothesis.settings(max_examples=12)(examples)
        examples()

    def __repr__(self):
        return f"{self.device}-{self.backend}"

    def __getattr__(self, op):
        return functools.partial(getattr(kdkernels, op), backend=self.backend)

    def leaf(self, x, dtype=None):
        """`x` on this device as a leaf that requires grad, with the strides that it has."""
        return x.detach().to(self.device, dtype or x.dtype).requires_grad_()


def places(ops):
    pairs = [(device, name) for device in DEVICES for name in backends.NAMES]
    return [Place(d, b) for d, b in pairs if all(b in backends.available(op, d) for op in ops)]


def is_interpreted(place):
    return place is not None and place.backend == "triton" and place.device == "cpu"


def place_of(item):
    """The place a collected test runs in, None where it has none."""
    return item.callspec.params.get("on") if hasattr(item, "callspec") else None


def pytest_configure(config):
    config.addinivalue_line("markers", "large: takes an interpreted backend too long")
    config.addinivalue_line("filterwarnings", "ignore:All-NaN:RuntimeWarning")  # of the interpreter


def pytest_generate_tests(metafunc):
    if "on" in metafunc.fixturenames:
        metafunc.parametrize("on", places(metafunc.module.OPS), ids=repr)


def pytest_collection_modifyitems(config, items):
    """Tests and parameters marked `large` run on every backend but an interpreted one."""
    out = [
        item
        for item in items
        if item.get_closest_marker("large") and is_interpreted(place_of(item))
    ]
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in set(out)]


@pytest.fixture
def threads():
    """Sets the number of threads; gives the old one back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A folder with a student that reads tones; see tones.py."""
    import tones

    folder = tmp_path_factory.mktemp("tones")
    tones.train(folder)
    return folder


@pytest.fixture(scope="session")
def recogniser(run):
    from kdkernels.asr import recognise

    return recognise.load(run)


@pytest.fixture(scope="session")
def long():
    """(samples, text, starts, ends): 100 seconds, longer than any window."""
    import tones

    text = tones.sentence(random.Random(1), 200)
    samples, starts, ends = tones.tones(text, np.random.default_rng(1))
    return samples, text, starts, ends
