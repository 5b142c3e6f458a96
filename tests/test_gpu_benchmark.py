"""benchmarks/gpu.py without a GPU: stand-ins for what it asks of one, and tiny rows. What is
written must be whole whatever fails: the minutes on a lent machine do not come again."""

import importlib.util
import json
import sys
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace

import pytest
import torch

from kdkernels.bench import contenders


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = perf_counter()

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def load(monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_benchmark", BENCHMARKS / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setenv("KDKERNELS_GPU_STARTED", "")
    monkeypatch.delenv("KDKERNELS_GPU_STARTED")
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def gpu(monkeypatch):
    module = load(monkeypatch)
    stand_ins = {
        "Event": Event,
        "synchronize": lambda: None,
        "_sleep": lambda cycles: None,
        "empty_cache": lambda: None,
        "is_available": lambda: True,
        "get_device_name": lambda: "a GPU",
        "get_device_capability": lambda: (9, 0),
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    for name in ("DEVICE", "FLUSH"):
        monkeypatch.setattr(module, name, {"DEVICE": "cpu", "FLUSH": 1 << 12}[name])
    monkeypatch.setattr(module, "BACKENDS", ("cpp", "reference"))
    monkeypatch.setattr(
        module, "kernel_seconds", lambda step: step() or {"recursion_kernel<float>": 1e-6}
    )
    monkeypatch.setattr(torch, "compile", lambda f, dynamic: f)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    every = enumerate(module.ROWS)
    tiny = [r._replace(T=min(r.T, 9), N=3 + i, C=7, S=min(r.S, 2)) for i, r in every]
    monkeypatch.setattr(module, "ROWS", tiny)
    return module


def run(gpu, monkeypatch, folder, *arguments):
    """The exit status and what was written."""
    path = folder / "new" / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--rounds", "2", "--json", str(path), *arguments])
    status = gpu.main()
    return status, json.loads(path.read_text()), path.with_suffix(".md").read_text()


def measured(found):
    return {(r["op"], r["shape"]): r for r in found["measure"]["rows"]}


MEASURE = ("--only", "measure", "--backend", "cpp", "reference")


@pytest.fixture(autouse=True)
def any_backend(gpu, monkeypatch):
    import argparse

    add = argparse.ArgumentParser.add_argument

    def lenient(self, name, *args, **kwargs):
        if name == "--backend":
            kwargs |= {"choices": gpu.BACKENDS, "default": gpu.BACKENDS}
        return add(self, name, *args, **kwargs)

    monkeypatch.setattr(argparse.ArgumentParser, "add_argument", lenient)


def test_the_committed_table_is_of_the_committed_rows(monkeypatch):
    results = BENCHMARKS / "results" / "gpu" / "gpu.json"
    found = json.loads(results.read_text()) if results.exists() else {}
    assert results.with_suffix(".md").read_text() == load(monkeypatch).table(found) + "\n"


def test_every_row_has_every_figure(gpu, monkeypatch, tmp_path):
    status, found, table = run(gpu, monkeypatch, tmp_path, *MEASURE)
    rows = measured(found)
    assert status == found["measure"]["status"] == 0
    assert len(rows) == len(gpu.ROWS)
    has_liger = importlib.util.find_spec("liger_kernel") is not None
    for row in gpu.ROWS:
        for backend in gpu.BACKENDS:
            figures = rows[row.op, row.label][backend]
            assert set(row.floors) - set(figures) <= (set() if has_liger else {"liger"})
    assert f"| `ctc_loss` | {gpu.ROWS[-1].label} | eager | 1 |" in table
    assert found["machine"]["gpu"] == "a GPU"


def test_a_contender_that_fails_costs_its_own_figures(gpu, monkeypatch, tmp_path):
    def fails(*_, **__):
        raise RuntimeError("not implemented for this dtype")

    monkeypatch.setitem(contenders.EAGER, "ctc_loss", fails)
    status, found, _ = run(gpu, monkeypatch, tmp_path, *MEASURE, "--row", "ctc_loss")
    assert status == 1
    rows = measured(found)
    assert {op for op, _ in rows} == {"ctc_loss"}
    for row in rows.values():
        assert list(row["failed"]) == ["eager"]
        assert "not implemented" in row["failed"]["eager"]
        assert row["seconds"]["cpp"] > 0
        assert "cpp" in row
    monkeypatch.undo()


def test_what_was_measured_before_stays(gpu, monkeypatch, tmp_path):
    run(gpu, monkeypatch, tmp_path, *MEASURE, "--row", "ctc_loss")
    _, before, _ = run(gpu, monkeypatch, tmp_path, *MEASURE, "--row", "kd_loss")
    assert len(measured(before)) == len([r for r in gpu.ROWS if r.op != "ctc_kd_loss"])
    monkeypatch.setattr(gpu, "STARTED", 0.0)  # long ago
    status, found, _ = run(gpu, monkeypatch, tmp_path, *MEASURE)
    assert status == 1
    assert found["measure"]["status"] == gpu.TIMED_OUT
    assert measured(found) == measured(before)


def test_a_command_is_stopped_and_its_log_kept(gpu, tmp_path):
    code = "import time; print('begun', flush=True); time.sleep(60)"
    found = gpu.run([sys.executable, "-c", code], 2, tmp_path / "log")
    assert found == {"status": gpu.TIMED_OUT, "said": ["begun"]}
    assert (tmp_path / "log").read_text() == "begun\n"


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        (
            "void kdkernels::cuda::(anonymous namespace)::kl_kernel<float, 8, false, true>"
            "(kdkernels::cuda::(anonymous namespace)::Problem, kdkernels::cuda::KLScale, int)",
            "kl_kernel<float, 8, false, true>",
        ),
        (
            "void kdkernels::cuda::statistics_kernel<kdkernels::cuda::BFloat16, float, true>"
            "(kdkernels::cuda::CTCProblem<float>, int, bool)",
            "statistics_kernel<BFloat16, float, true>",
        ),
        ("ctc_first_kernel", "ctc_first_kernel"),
    ],
)
def test_names_of_kernels(gpu, kernel, name):
    assert gpu.without_parameters(kernel) == name


def test_steps_call_their_tools(gpu, monkeypatch, tmp_path):
    """Of commands only what they are."""
    commands = []

    def noted(command, limit, log, **_):
        assert 0 < limit <= 500
        commands.append((Path(log).name, [str(x) for x in command]))
        return gpu.outcome(0, [])

    monkeypatch.setattr(gpu, "run", noted)
    monkeypatch.setattr(gpu, "has_kernels", lambda: True)
    monkeypatch.setattr(gpu, "BUILT", tmp_path / "built")
    gpu.BUILT.write_text(gpu.sources())
    monkeypatch.setattr(gpu.shutil, "which", lambda name, path=None: f"/bin/{name}")
    arguments = ("--only", "build", "test", "sanitize", "profile", "--limit", "500")
    arguments += ("--backend", "cpp", "--row", "ctc_")
    status, found, _ = run(gpu, monkeypatch, tmp_path, *arguments)
    assert status == 0
    assert found["build"]["said"] == ["already built"]
    assert [name for name, _ in commands] == [
        "test.log",
        "memcheck.log",
        "racecheck.log",
        "profile.log",
    ]
    assert "cuda-cpp or cuda-reference" in commands[0][1]
    assert {"memcheck", "racecheck"} <= {command[2] for _, command in commands[1:]}
    under_profiler = commands[-1][1]
    assert under_profiler[0] == "/bin/ncu"
    # What runs under the profiler: a step of each of the rows, each between a start and a stop.
    own = under_profiler.index(sys.executable) + 2
    did = []
    profiler = SimpleNamespace(
        cudaProfilerStart=lambda: did.append("start"), cudaProfilerStop=lambda: did.append("stop")
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: profiler)
    monkeypatch.setattr(sys, "argv", ["gpu.py", *under_profiler[own:]])
    gpu.main()
    assert did == ["start", "stop"] * len([row for row in gpu.ROWS if row.op.startswith("ctc_")])
    assert len(gpu.operator_tests()) > 5
