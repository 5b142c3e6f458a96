"""The Triton kernels as machine code, for GPUs that need not be there."""

import json
import os
import subprocess
import sys

import pytest

triton = pytest.importorskip("triton")

HERE = os.path.dirname(__file__)
SPILLS = ("jsd", "float64", "1200")  # float64 divergences; more labels than fit one warp


@pytest.fixture(scope="module", params=[80, 90])
def kernels(request):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, os.path.join(HERE, "triton_compile.py"), str(request.param)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_every_kernel_compiles_without_spills(kernels):
    assert len({k["kernel"] for k in kernels}) == 8
    for k in kernels:
        if not any(word in k["case"] for word in SPILLS):
            assert k["spills"] == k["stack"] == 0, k


def test_rows_are_read_sixteen_bytes_at_a_time(kernels):
    for k in kernels:
        if k["kernel"] in ("kd_loss_kernel", "ctc_rows_kernel", "ctc_gradient_kernel"):
            assert k["wide_loads"] >= 2, k


def test_two_exponentials_a_class_where_the_row_stays_on_chip(kernels):
    """8192 classes, 16 warps: 16 classes of each tensor a thread."""
    found = [k for k in kernels if k["case"].startswith("kd_loss 5000")]
    assert found
    assert all(k["exponentials"] == 2 * 16 for k in found if k["kernel"] == "kd_loss_kernel")


def test_recursion_of_one_warp(kernels):
    """Two shuffles a frame, four frames a round, and no barrier."""
    found = [k for k in kernels if k["kernel"] == "ctc_first_kernel" and "100)" in k["case"]]
    assert found
    assert all(k["shuffles"] == 2 * 4 and k["barriers"] == 0 for k in found)
