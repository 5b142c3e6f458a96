"""The Triton kernels as machine code, for GPUs that need not be there."""

import json
import os
import subprocess
import sys

import pytest

triton = pytest.importorskip("triton")

HERE = os.path.dirname(__file__)
SPILLS = ("jsd", "float64", "1200")  # float64 divergences; more labels than fit a few warps
A_FEW = 320  # bytes, of the second half of the recursion with 400 labels


@pytest.fixture(scope="module")
def compiled():
    """{capability: lines of triton_compile.py}, both at the same time"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script, pipe = os.path.join(HERE, "triton_compile.py"), subprocess.PIPE
    runs = {
        capability: subprocess.Popen(
            [sys.executable, script, str(capability)],
            env=environment, stdout=pipe, stderr=pipe, text=True,
        )
        for capability in (80, 90)
    }  # fmt: skip
    results = {}
    for capability, process in runs.items():
        out, said = process.communicate()
        assert process.returncode == 0, said[-3000:]
        results[capability] = [json.loads(line) for line in out.splitlines()]
    return results


@pytest.fixture(params=[80, 90])
def kernels(request, compiled):
    return [k for k in compiled[request.param] if "kernel" in k]


@pytest.mark.parametrize("capability", [80, 90])
def test_another_batch_compiles_nothing(compiled, capability):
    """Other numbers of frames, utterances and rows: what was compiled before will do."""
    (again,) = [k["again"] for k in compiled[capability] if "again" in k]
    assert again == {"before": again["before"], "compiled": []}
    assert again["before"] > 10


def test_every_kernel_compiles_without_spills(kernels):
    assert len({k["kernel"] for k in kernels}) == 8
    for k in kernels:
        if not any(word in k["case"] for word in SPILLS):
            assert max(k["spills"], k["stack"]) <= A_FEW * ("S = 400" in k["case"]), k


def test_rows_are_read_sixteen_bytes_at_a_time(kernels):
    for k in kernels:
        if k["kernel"] in ("kd_loss_kernel", "ctc_rows_kernel", "ctc_gradient_kernel"):
            reads_no_rows = (k["case"], k["kernel"]) == ("posteriors", "ctc_gradient_kernel")
            assert k["wide_loads"] >= 2 or reads_no_rows, k


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
