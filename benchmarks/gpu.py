"""Everything that only a GPU can show, in one command.

    python benchmarks/gpu.py [--only build test sanitize measure profile] [--limit SECONDS]
                             [--json FILE]

Builds the extension where it is missing, runs the tests of the device, runs compute-sanitizer over
some of them where it is installed, measures the rows below (CUDA events, caches emptied before
every step, medians) and reads the hardware's counters of their kernels where Nsight Compute is
installed. Writes one JSON file, and a table and logs beside it, after every row; steps and rows
that were not asked for keep what the file says of them, so that a machine lent for minutes can do
them one by one. What outlasts the limit is stopped, and said to be.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter, time
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
BUILT = ROOT / "build" / "gpu-sources"
STEPS = ("build", "test", "sanitize", "measure", "profile")
ONCE = "once"  # what runs under the profiler
BACKENDS = ("cuda", "triton")
CHECKS = ("memcheck", "racecheck")
DEVICE = "cuda"
FLUSH = 1 << 30  # bytes: several times the caches
SLEEP = 4_000_000  # cycles, some 2 ms

# A Python that starts again, after the build, goes on with the time of the one before.
STARTED = float(os.environ.setdefault("KDKERNELS_GPU_STARTED", str(time())))


class Row(NamedTuple):
    op: str
    T: int  # 1 for kd_loss, which sees rows only
    N: int
    C: int
    S: int
    dtype: str
    floors: dict  # what -> at least (`ns_a_frame`: at most)
    passes: int = 0  # logit tensors that must be read or written
    host: bool = False  # wall time of a call, without waiting, instead of the device's

    @property
    def label(self):
        sizes = (self.N, self.C) if self.op == "kd_loss" else (self.T, self.N, self.C, self.S)
        return f"({', '.join(map(str, sizes))}) {self.dtype}"


def _kd(N, C, dtype, passes, **floors):
    return Row("kd_loss", 1, N, C, 0, dtype, floors, passes)


RECURSION = ("recursion_kernel", "ctc_first", "ctc_second")  # in the names of kernels
LOGITS = 1 << 26
ON_CHIP = 8192  # classes of a row that is read once
LARGE = {"of_copy": 0.85, "compile": 3, "liger": 2}
ROWS = [
    _kd(LOGITS // C, C, dtype, 3 if C <= ON_CHIP else 5, **LARGE)
    for C in (1024, 5000, 32000, 128256)
    for dtype in ("float32", "bfloat16")
]
ROWS += [_kd(100_000, C, dtype, 3, of_copy=0.7)
         for C in (32, 128) for dtype in ("float32", "bfloat16")]  # fmt: skip
ROWS += [
    Row("ctc_loss", 1000, 32, 128, 100, "float32", {"eager": 20, "ns_a_frame": 60}),
    Row("ctc_loss", 500, 32, 32, 100, "float32", {"eager": 20, "ns_a_frame": 60}),
    Row("ctc_loss", 2000, 128, 32, 400, "float32", {"eager": 10}),
    Row("ctc_loss", 400, 32, 5000, 60, "float32", {"eager": 4}),
    Row("ctc_loss", 400, 32, 5000, 60, "bfloat16", {"eager": 8}),
    Row("ctc_kd_loss", 1000, 32, 128, 100, "float32", {"separate": 1.5}),
    Row("ctc_kd_loss", 400, 32, 5000, 60, "float32", {"separate": 1.5}),
    Row("ctc_loss", 50, 16, 20, 15, "float32", {"eager": 1}, host=True),
]


# ------------------------------------------------------------------------------ build and tests


TIMED_OUT = 124


def seconds_left(args):
    return max(1.0, STARTED + args.limit - time())


def run(command, limit, log, **environment):
    """Exit status and last lines of a command, whose output is shown and kept in `log` as well."""
    print("$", *command, flush=True)
    process = subprocess.Popen(
        [str(x) for x in command], cwd=ROOT, env={**os.environ, **environment}, text=True,
        errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    late = threading.Event()

    def stop():
        late.set()
        os.killpg(process.pid, signal.SIGKILL)  # its workers too, which hold the pipe

    timer = threading.Timer(limit, stop)
    timer.start()
    lines = []
    with process.stdout, open(log, "w", buffering=1) as file:
        for line in process.stdout:
            print(line, end="", flush=True)
            file.write(line)
            lines.append(line.rstrip())
    status = process.wait()
    timer.cancel()
    return outcome(TIMED_OUT if late.is_set() else status, lines[-25:])


def log_of(args, name):
    return args.json.parent / f"{name}.log"


def outcome(status, lines):
    return {"status": status, "said": lines}


def sources():
    """A digest of all that is compiled."""
    digest = hashlib.sha256()
    for folder in ("csrc", "python"):
        for path in sorted((ROOT / folder).rglob("*.*")):
            digest.update(path.read_bytes())
    return digest.hexdigest() + "\n"


def has_kernels():
    """Whether a Python that starts now finds an extension with the kernels of the GPU."""
    code = "import torch; from kdkernels import _C; _C.cuda"
    return not subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True
    ).returncode


def build(args):
    """Installs the package, editable, unless it is there with the kernels of the GPU, of these
    sources. Compiled is for this GPU alone, which takes a third of the time."""
    if has_kernels() and BUILT.exists() and BUILT.read_text() == sources():
        return outcome(0, ["already built"])
    major, minor = torch.cuda.get_device_capability()
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-v"]
    pip += ["-C", f"cmake.define.CMAKE_CUDA_ARCHITECTURES={major}{minor}", "-e", "."]
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    built = run(pip, seconds_left(args), log_of(args, "build"), CUDACXX=nvcc)
    if not built["status"] and not has_kernels():
        return outcome(1, ["built, but without the GPU's kernels: is nvcc 12 or newer there?"])
    if not built["status"]:
        BUILT.parent.mkdir(exist_ok=True)
        BUILT.write_text(sources())
        # What was installed is found by a Python that starts after it.
        print("built; starting again", flush=True)
        os.execv(sys.executable, [sys.executable, *sys.argv])
    return built


def operator_tests():
    """Tests of the operators: they need nothing but torch, pytest, hypothesis and numpy."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [path for path in files if re.search(r"^OPS\b", path.read_text(), re.MULTILINE)]


def pytest(*arguments):
    """Warnings are not errors here: torch is the machine's, not the pinned one."""
    plugins = ["-p", "no:benchmark", "-p", "no:cacheprovider", "-W", "default"]
    if importlib.util.find_spec("pytest_timeout"):  # a kernel that hangs costs one test
        plugins += ["--timeout", "900"]  # a test of Triton's may compile dozens of kernels
    return [sys.executable, "-m", "pytest", "-q", *plugins, *arguments]


def test(args):
    """Every operator's tests on the device, and what needs a device."""
    places = " or ".join(f"cuda-{name}" for name in (*args.backend, "reference"))
    workers = []
    if importlib.util.find_spec("xdist"):
        workers = ["-n", str(min(14, os.cpu_count()))]
    command = pytest(*workers, *operator_tests(), "-k", places, "--durations", "10")
    return run(
        command, seconds_left(args), log_of(args, "test"),
        OMP_NUM_THREADS="2", KDKERNELS_EMULATION="0",
    )  # fmt: skip


def cuda_tool(name):
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def sanitize(args):
    """Out-of-bounds accesses and races in the compiled kernels: the edges, every operator."""
    tool = cuda_tool("compute-sanitizer")
    if tool is None:
        return outcome(None, ["compute-sanitizer is not installed"])
    tests = pytest("-x", ROOT / "tests" / "test_edges.py", "-k", "cuda-cuda")
    results = {}
    for left, check in zip(range(len(args.check), 0, -1), args.check, strict=True):
        command = [tool, "--tool", check, "--error-exitcode", 9, "--target-processes", "all"]
        if check == "memcheck":  # torch asks for things that it bears not to get
            command += ["--report-api-errors", "no"]
        results[check] = run(
            [*command, *tests], seconds_left(args) / left, log_of(args, check),
            PYTORCH_NO_CUDA_MEMORY_CACHING="1", KDKERNELS_EMULATION="0",
        )  # fmt: skip
    return {"status": max(abs(x["status"]) for x in results.values()), **results}


# --------------------------------------------------------------------------------- measurements


class Timer:
    """Median seconds of a step on the device, its caches emptied before."""

    def __init__(self, rounds):
        self.rounds = rounds
        self.flush = torch.zeros(FLUSH // 4, device=DEVICE)

    def __call__(self, step):
        for _ in range(3):  # compiles
            step()
        events = []
        for _ in range(self.rounds):
            torch.cuda._sleep(SLEEP)  # longer than the host needs to launch the step
            self.flush.zero_()
            self.flush.sum()  # or writing the zeros back would be part of the step
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return median(a.elapsed_time(b) for a, b in events) / 1e3

    def host(self, step, calls=200):
        """Wall seconds a call, one after the other."""
        times = []
        for _ in range(self.rounds):
            step()
            torch.cuda.synchronize()
            start = perf_counter()
            for _ in range(calls):
                step()
            torch.cuda.synchronize()
            times.append((perf_counter() - start) / calls)
        return median(times)


def copy_bandwidth(timer):
    """Bytes read and written per second."""
    source = torch.ones(FLUSH // 4, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / timer(lambda: target.copy_(source))


def kernel_seconds(step, steps=10):
    """Name of each kernel (without its parameters) -> its device seconds in one step, with warm
    caches."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    found = {}
    for event in profiled.key_averages():
        name = without_parameters(event.key)
        found[name] = found.get(name, 0) + event.device_time_total / 1e6 / steps
    return {name: seconds for name, seconds in found.items() if seconds > 0}


def without_parameters(kernel):
    """A kernel's name as the profiler gives it, without namespaces and parameters."""
    return re.sub(r"^void |\(anonymous namespace\)::|\w+::|\(.*$", "", kernel)


def liger_step(inputs, temperature):
    """log_softmax and Liger's KL."""
    from liger_kernel.transformers import LigerKLDIVLoss

    loss = LigerKLDIVLoss(reduction="batchmean")

    def step():
        inputs.student.grad = None
        log_p = torch.log_softmax(inputs.student / temperature, -1)
        loss(log_p, torch.softmax(inputs.teacher / temperature, -1)).backward()

    return step


def inputs_of(row):
    from kdkernels.bench.contenders import make_inputs
    from kdkernels.bench.shapes import Shape

    shape = Shape(row.op, row.T, row.N, row.C, row.S)
    return make_inputs(shape, getattr(torch, row.dtype), DEVICE)


def own_step(op, inputs, backend):
    from kdkernels.bench.contenders import OURS, step_of

    return step_of(lambda i, x: OURS[op](i, x, backend=backend), inputs)


def measure_row(row, timer, bandwidth, names):
    from kdkernels.bench import contenders as c

    torch.compiler.reset()  # what was compiled for other shapes counts against a limit
    inputs = inputs_of(row)
    seconds, failed = {}, {}

    def measured(name, make):
        """A contender that fails costs its own figures alone."""
        try:
            return (timer.host if row.host else timer)(make())
        except Exception:
            failed[name] = traceback.format_exc()[-2000:]

    eager = c.EAGER[row.op]
    rivals = {"eager": lambda: c.step_of(eager, inputs)}
    if row.op == "kd_loss":
        rivals["compile"] = lambda: c.step_of(torch.compile(eager, dynamic=False), inputs)
        if importlib.util.find_spec("liger_kernel") is not None:
            rivals["liger"] = lambda: liger_step(inputs, c.TEMPERATURE)
    result = {"op": row.op, "shape": row.label, "seconds": seconds, "floors": row.floors}
    for backend in names:
        step = own_step(row.op, inputs, backend)
        own = measured(backend, lambda step=step: step)
        if own is None:
            continue
        seconds[backend], figures = own, {}
        if row.op == "ctc_kd_loss":
            two = partial(c.separate_ctc_kd, backend=backend)
            separate = measured(f"separate {backend}", lambda two=two: c.step_of(two, inputs))
            if separate is not None:
                figures["separate"] = separate / own
        if row.passes:
            figures["of_copy"] = row.passes * inputs.student.nbytes / own / bandwidth
        if not row.host:
            figures["kernels"] = kernel_seconds(step)
        if "ns_a_frame" in row.floors:
            found = figures["kernels"].items()
            total = sum(of for name, of in found if any(word in name for word in RECURSION))
            if total > 0:  # else the profiler saw nothing
                figures["ns_a_frame"] = total / row.T * 1e9
        result[backend] = figures
    for name, make in rivals.items():
        if (theirs := measured(name, make)) is not None:
            seconds[name] = theirs
            if name == "eager" and not row.host:
                # torch's CTC waits for the lengths: of its step the device may idle a part.
                result["eager_kernels"] = kernel_seconds(make())
            for backend in names:
                if backend in result:
                    result[backend][name] = theirs / seconds[backend]
    return result | ({"failed": failed} if failed else {})


def is_wanted(row, args):
    return not args.row or row.op.startswith(args.row) or args.row in row.label


def measure(args, before, save):
    """Rows that fail say why, and the others are measured all the same."""
    timer = Timer(args.rounds)
    bandwidth = copy_bandwidth(timer)
    print(f"copy {bandwidth / 1e12:.2f} TB/s", flush=True)
    rows = {r["op"] + r["shape"]: r for r in before.get("rows", [])}
    result = {"status": 0, "copy_bytes_per_second": bandwidth}
    for row in ROWS:
        if not is_wanted(row, args):
            continue
        if time() > STARTED + args.limit:
            result["status"] = TIMED_OUT
            break
        try:
            found = measure_row(row, timer, bandwidth, args.backend)
        except Exception:  # whatever it is: minutes of a lent machine are not lost to one row
            result["status"] = 1
            found = {"op": row.op, "shape": row.label, "error": traceback.format_exc()[-2000:]}
        print(json.dumps(found), flush=True)
        old = rows.get(row.op + row.label, {})  # of the other backend, perhaps
        old = {k: v for k, v in old.items() if k not in ("error", "failed")}
        result["status"] = result["status"] or int("failed" in found)
        seconds = {**old.get("seconds", {}), **found.get("seconds", {})}
        rows[row.op + row.label] = {**old, **found, "seconds": seconds}
        save({**result, "rows": list(rows.values())})
        torch.cuda.empty_cache()
    return {**result, "rows": list(rows.values())}


def profile(args):
    """The counters of the kernels of a step of each row, by a Python of its own under ncu."""
    tool = cuda_tool("ncu")
    if tool is None:
        return outcome(None, ["ncu is not installed"])
    command = [tool, "--clock-control", "none", "--profile-from-start", "off", "--set", "basic"]
    command += ["--section", "WarpStateStats", "--section", "MemoryWorkloadAnalysis"]
    command += [sys.executable, __file__, "--only", ONCE, "--backend", *args.backend]
    command += ["--row", args.row] if args.row else []
    return run(command, seconds_left(args), log_of(args, "profile"))


def steps_to_profile(args):
    profiler = torch.cuda.cudart()
    for row in (x for x in ROWS if is_wanted(x, args)):
        inputs = inputs_of(row)
        for backend in args.backend:
            step = own_step(row.op, inputs, backend)
            for _ in range(3):  # compiles
                step()
            torch.cuda.synchronize()
            print(row.op, row.label, backend, flush=True)
            profiler.cudaProfilerStart()
            step()
            torch.cuda.synchronize()
            profiler.cudaProfilerStop()


# --------------------------------------------------------------------------------------- report


def text_of(command):
    try:
        return subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def describe(commit):
    import triton

    return {
        "gpu": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "driver": text_of(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        ),
        "nvcc": text_of(["nvcc", "--version"]).splitlines()[-1],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit or text_of(["git", "describe", "--always", "--dirty", "--abbrev=40"]),
    }


def table(result):
    """Markdown: every row, every floor, what each backend reached."""
    measured = {r["op"] + r["shape"]: r for r in result.get("measure", {}).get("rows", [])}
    lines = [f"| op | shape | what | floor | {' | '.join(BACKENDS)} |", "|---|---|---|---|---|---|"]
    for row in ROWS:
        found = measured.get(row.op + row.label)
        for what, floor in row.floors.items():
            cells = []
            for backend in BACKENDS:
                value = (found or {}).get(backend, {}).get(what)
                if value is None:
                    cells.append("not measured")
                else:
                    met = value <= floor if what == "ns_a_frame" else value >= floor
                    cells.append(f"{value:.3g}{'' if met else ' (missed)'}")
            lines.append(f"| `{row.op}` | {row.label} | {what} | {floor} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument(
        "--only",
        nargs="+",
        choices=(*STEPS, ONCE),
        default=STEPS,
        metavar="STEP",
        help=f"of {', '.join(STEPS)} [all]",
    )
    p.add_argument(
        "--row",
        help="measure and profile only rows whose operator begins so, or whose shape contains it",
    )
    p.add_argument("--backend", nargs="+", choices=BACKENDS, default=BACKENDS)
    p.add_argument("--check", nargs="+", choices=CHECKS, default=CHECKS, help="of the sanitizer")
    p.add_argument("--rounds", type=int, default=25)
    p.add_argument("--limit", type=float, default=3600, help="seconds for all of it")
    p.add_argument("--commit", help="where the sources are no git checkout")
    p.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/gpu/gpu.json")
    args = p.parse_args()
    if not torch.cuda.is_available():
        print(table({}))
        print(
            "\ngpu.py: expected a GPU, got none: torch.cuda.is_available() is False",
            file=sys.stderr,
        )
        return 2
    if ONCE in args.only:
        return steps_to_profile(args)
    result = json.loads(args.json.read_text()) if args.json.exists() else {}
    result["machine"] = describe(args.commit)
    args.json.parent.mkdir(parents=True, exist_ok=True)

    def save(name, found):
        result[name] = found
        args.json.write_text(json.dumps(result, indent=1) + "\n")
        args.json.with_suffix(".md").write_text(table(result) + "\n")

    failed = False
    steps = {"build": build, "test": test, "sanitize": sanitize, "profile": profile}
    for name in (x for x in STEPS if x in args.only):
        start = perf_counter()
        if name == "measure":
            found = measure(args, result.get(name, {}), lambda done: save("measure", done))
        else:
            found = steps[name](args)
        save(name, {**found, "seconds": perf_counter() - start})
        failed = failed or bool(found["status"])
    print(table(result))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
