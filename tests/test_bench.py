"""The benchmarks' reports: what the README and docs/ say is what the committed results make."""

import json
import sys
import types
from itertools import accumulate
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from kdkernels.bench import __main__ as bench_main
from kdkernels.bench import cells, instructions, markdown, peers, sections
from kdkernels.bench.__main__ import parse
from kdkernels.bench.compare import count_verdict, interval, verdict
from kdkernels.bench.contenders import Contender, contenders, make_inputs
from kdkernels.bench.errors import errors, judged
from kdkernels.bench.report import PAGE, README, checked, markers, with_section
from kdkernels.bench.report import main as report_main
from kdkernels.bench.shapes import OPS, SHAPES, TINY, Shape
from kdkernels.bench.timing import MIN_ROUNDS, interleave, ratio

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def results():
    return [json.loads(p.read_text()) for p in sorted((ROOT / "benchmarks/results").glob("*.json"))]


@pytest.mark.parametrize("name", README)
def test_readme_agrees_with_the_results(results, name):
    begin, end = markers(name)
    shown = (ROOT / "README.md").read_text().split(begin)[1].split(end)[0]
    assert shown.strip() == README[name](results)


def test_docs_agree_with_the_results(results):
    plots = tuple(p.name for p in sorted((ROOT / "docs").glob("benchmark-*.png")))
    page = (ROOT / "docs" / PAGE).read_text()
    assert sorted(plots) == sorted(x for x in plots if f"]({x})" in page)
    before_plots = page.split("\n\n## Figures")[0].strip()
    assert before_plots == markdown.report(results).strip()


def test_a_row_where_another_is_faster_says_why(results):
    for result in results:
        assert sections.UNSAID not in sections.not_the_fastest(result)


def test_a_floor_that_is_missed_has_a_reason(results):
    for result in results:
        assert sections.UNSAID not in sections.floors(result)


def test_a_ratio_lies_within_its_quartiles(results):
    for row in (row for result in results for row in result["rows"]):
        for name, r in row["ratios"].items():
            assert r["p25"] <= r["value"] <= r["p75"], (row["op"], row["shape"], name)


def test_another_that_is_faster_is_named():
    row = {"op": "kd_loss", "shape": "(1, 2)"}
    ratios = {"eager": 0.5, "separate": 4.0, "compile": 2.0, "copy": 9.0}
    row["ratios"] = {n: {"value": r} for n, r in ratios.items()}
    text = sections.not_the_fastest({"machine": {"cpu": "any"}, "rows": [row]})
    assert f"eager torch is 2.00 times as fast. {sections.UNSAID}" in text
    assert "ctc_loss + kd_loss is 4.00 times as fast" in text
    assert len(text.splitlines()) == 2


def test_a_gpu_that_was_not_measured_is_said_to_be_missing(results):
    cpu = [r for r in results if not r["machine"].get("gpu")]
    for text in (markdown.readme_section(cpu), markdown.report(cpu)):
        assert markdown.NO_GPU in text
    with_gpu = [cpu[0] | {"machine": cpu[0]["machine"] | {"gpu": "NVIDIA H100"}}]
    assert markdown.NO_GPU not in markdown.readme_section(with_gpu)
    assert "NVIDIA H100" in markdown.readme_section(with_gpu)


def test_every_section_of_the_report_is_made_from_a_complete_result():
    row = {
        "op": "kd_loss",
        "shape": "(64, 32)",
        "note": "smallest call",
        "logit_bytes": 8192,
        "seconds": {
            "ours": {"median": 2e-5, "p25": 1.9e-5, "p75": 2.1e-5},
            "eager": {"median": 5e-5, "p25": 4e-5, "p75": 6e-5},
        },
        "ratios": {"eager": {"value": 2.5, "p25": 2.4, "p75": 2.6}},
        "gigabytes_per_second": 1.2288,
        "share_of_copy_bandwidth": 0.12,
        "floors": {"eager": {"floor": 3, "met": False}},
        "copy_bytes_per_second": 1e10,
        "one_thread": {
            n: {"median": x, "p25": x, "p75": x} for n, x in (("ours", 3e-5), ("eager", 9e-5))
        },
        "peak_memory": {"ours": 1.0, "eager": 5.25},
        "loop": {"ours": 1e-4, "eager": 2e-4, "idle": 5e-5},
        "errors": {
            "ours": {"loss_relative": 1e-7, "grad_relative": 2e-7, "differs": False},
            "eager": {"loss_relative": 1e-2, "grad_relative": 2e-7, "differs": True},
        },
    }
    result = {
        "machine": {"cpu": "a CPU"},
        "versions": {"torch": "2.13.0", "kdkernels": "0.1.0"},
        "commit": "0123456789abcdef-dirty",
        "peers": {"optax": {"version": None, "why_not": "not installed"}},
        "threads": 2,
        "dtype": "float32",
        "rows": [row],
        "accuracy": {
            "ctc_against_T": [{"T": 50, "ours": 1e-6, "eager": 1e-4}],
            "kd_against_kl": [{"kl": 1e-8, "ours": 1e-5, "eager": 0.9, "trl": 0.8}],
        },
        "scaling": [
            {
                "op": "ctc_loss",
                "axis": "T",
                "others": {"N": 8},
                "points": [{"x": 100, "ours": 1e-3, "eager": 2e-2}],
            }
        ],
        "training_step": [
            {
                "shape": "(200, 8, 32, 40)",
                "parameters": 500_000,
                "seconds": {"ours": 0.02, "eager": 0.05, "idle": 0.019},
                "share": {"ours": 0.05, "eager": 0.62},
            }
        ],
    }
    text = markdown.report([result])
    for title in sections.SECTIONS:
        assert f"### {title}\n" in text
    assert "optax: no row; not installed" in text
    assert "at 0123456789ab with changes, float32" in text
    assert "1.0e-02 / 2.0e-07 **differs**" in text
    assert "| `kd_loss` | (64, 32) | 0.02 ms | 0.05 ms (2.5x) |  | 12% | 1.0 V | 5.2 V |" in (
        markdown.readme_section([result])
    )
    assert "floor >= 3: MISSED" in markdown.row_text(row)
    assert "Where another is faster:\n\nNowhere" in markdown.summary(result)
    assert "2.5 times as fast as eager torch, at least 3 wanted" in markdown.summary(result)
    slower = {**row, "ratios": {"eager": {"value": 0.5}}, "peak_memory": None}
    gains = "0.5x to 12x, median 2.5x | 5.2x to 5.2x, median 5.2x |"
    faster = {**slower, "ratios": {"eager": {"value": 12.4}}}
    head = markdown.headline([result | {"rows": [row, slower, faster]}])
    assert f"| `kd_loss` | a CPU, 2 threads | {gains}" in head


@pytest.mark.parametrize("content", ["{}", "[]", '{"rows": []}', "nothing"])
def test_what_is_no_result_changes_nothing(tmp_path, monkeypatch, capsys, content):
    (tmp_path / "README.md").write_text("as it was")
    (tmp_path / "some.json").write_text(content)
    command = ["report", str(tmp_path / "some.json"), "--root", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="2"):
        report_main()
    assert "some.json is not a result of" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "some.json"]
    assert (tmp_path / "README.md").read_text() == "as it was"


@pytest.mark.parametrize("at", ["measure_rows", "accuracy", "training_step"])
def test_ctrl_c_keeps_the_rows_that_are_done(tmp_path, monkeypatch, capsys, at):
    def stop(_):
        raise KeyboardInterrupt

    def rows(_):
        yield {"op": "kd_loss", "shape": "(32, 16)", "floors": {}}
        if at == "measure_rows":
            stop(_)

    for name in ("accuracy", "scaling", "training_step"):
        monkeypatch.setattr(bench_main, name, stop if name == at else lambda _: [])
    monkeypatch.setattr(bench_main, "measure_rows", rows)
    monkeypatch.setattr(bench_main.markdown, "row_text", str)
    results = tmp_path / "some.json"
    command = ["bench", "--tiny", "--json", str(results), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    assert bench_main.main() == 130
    assert f"stopped: 1 rows are done, and in {results}" in capsys.readouterr().err
    assert len(json.loads(results.read_text())["rows"]) == 1


def test_a_result_that_ends_early_is_refused(results):
    assert checked(results[0]) is results[0]
    for part in ("accuracy", "scaling", "training_step"):
        with pytest.raises(ValueError, match=f"it ends before {part}"):
            checked({k: v for k, v in results[0].items() if k != part})


def test_readme_without_markers_is_an_error():
    with pytest.raises(SystemExit, match="expected one pair"):
        with_section("nothing", "speed", "a table")


def test_contenders_take_turns_until_the_rounds_or_the_seconds_are_over():
    turns = []
    steps = {"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}
    times = interleave(steps, rounds=20, cold=True)  # cold: one call a turn
    assert [len(t) for t in times.values()] == [20, 20]
    rounds = {"".join(turns[-2 * i - 2 :][:2]) for i in range(20)}
    assert rounds == {"ab", "ba"}


def test_who_has_used_its_part_of_the_seconds_runs_a_few_rounds_spread_evenly():
    steps = dict.fromkeys("ab", lambda: None)
    times = interleave(steps, 50, seconds=0, cold=True)
    assert list(times["a"]) == list(range(50))  # the first, which others are compared with
    assert list(times["b"]) == [0, 10, 20, 30, 40]
    assert len(times["b"]) == MIN_ROUNDS


def test_a_ratio_is_of_rounds_that_both_ran_in():
    times = {"a": {0: 2.0, 3: 4.0, 6: 6.0}, "b": {0: 1.0, 1: 9.0, 2: 1.0, 3: 1.0, 6: 2.0}}
    assert ratio(times, "a", "b") == {"value": 3.0, "p25": 2.5, "p75": 3.5}


def test_a_shape_that_no_row_has_is_an_error(capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(["--shape", "zzz", "--tiny", "--op", "ctc_loss"])
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith("no row has 'zzz'; there are (20, 3, 8, 4), (20, 3, 8, 4) varying")
    assert parse(["--shape", "varying", "--tiny"]).shape == "varying"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--rounds", "1"], "--rounds must be at least 2, got 1"),
        (["--seconds", "-1"], "--seconds must be greater than 0, got -1.0"),
        (["--backend", "cuda"], "--backend must be one of cpp, "),
        (["--threads", "1000000"], "--threads must be at most 4 times the "),
        (["--json", "."], "--json: expected a file, got the folder ."),
        (["--out", "/dev/null/x"], "cannot write into the folder /dev/null/x: "),
        (["--op", "kd_loss", "--json", "/dev/null/x/y.json"], "cannot write into the folder"),
    ],
)
def test_options_that_make_no_sense(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(arguments)
    assert f"python -m kdkernels.bench: error: {message}" in capsys.readouterr().err


def test_a_backend_of_the_environment_that_is_not_here(monkeypatch, capsys):
    monkeypatch.setenv("KDKERNELS_BACKEND", "foo")
    with pytest.raises(SystemExit, match="2"):
        parse(["--tiny"])
    assert "expected KDKERNELS_BACKEND in" in capsys.readouterr().err


def test_a_contender_off_float64_is_marked():
    assert judged(loss_relative=1e-3)["differs"]
    assert judged(loss_relative=0.0, grad_relative=float("nan"))["differs"]
    assert not judged(loss_relative=1e-7, grad_relative=1e-6)["differs"]


def test_a_gradient_of_zeros_is_marked():
    shape = Shape("kd_loss", 1, 4, 100_000)  # whose largest gradient is far below 1
    inputs = make_inputs(shape)

    def zeros():
        loss, grad = contenders(shape, inputs, only=("ours",))["ours"].result()
        return loss, torch.zeros_like(grad)

    assert errors(shape, inputs, {"ours": Contender(None, zeros)})["ours"]["differs"]


def test_a_row_has_moved_only_when_it_leaves_the_noise():
    old = [1.0] * 25
    quiet = {"old": old, "again": old}
    assert verdict(quiet | {"new": [1.1] * 25})["moved"] == "slower"
    assert verdict(quiet | {"new": [0.9] * 25})["moved"] == "faster"
    assert verdict(quiet | {"new": [1.01] * 25})["moved"] == ""
    assert verdict({"old": old, "again": [1.2] * 25, "new": [1.1] * 25})["moved"] == ""
    assert interval([float(i) for i in range(25)]) == (7.0, 17.0)


def test_instructions_are_those_of_the_extension_alone():
    dump = """desc: Trigger: Client Request: 7
events: Ir
ob=/site/kdkernels/_C.cpython-311-x86_64-linux-gnu.so
fn=0x1
0 100
cob=/lib/libm.so.6
cfn=log
calls=2 0
0 1000
0 20
ob=/lib/libm.so.6
fn=log
0 1000
ob=/site/kdkernels/_C.cpython-311-x86_64-linux-gnu.so
fn=0x2
0 3
"""
    assert instructions.parse(dump) == (7, 123)
    assert instructions.parse("desc: Trigger: Program termination") is None
    assert count_verdict(1000, 1004)["moved"] == ""
    assert count_verdict(1000, 1006)["moved"] == "slower"
    assert count_verdict(1000, 994)["moved"] == "faster"


@pytest.mark.parametrize("shape", TINY, ids=lambda s: f"{s.op} {s.label}")
def test_every_contender_runs(shape):
    inputs = make_inputs(shape)
    rivals = contenders(shape, inputs, compile=False)
    assert next(iter(rivals)) == "ours"
    for rival in rivals.values():
        rival.step()
    found = errors(shape, inputs, rivals)
    assert set(found) == set(rivals) - {"copy"}
    assert not any(e["differs"] for e in found.values())


def test_a_peer_that_raises_costs_its_own_figures_alone(monkeypatch):
    def broken(*args, **options):
        raise TypeError("another argument\nand more")

    shape = TINY[0]
    monkeypatch.setattr(peers, "trl_divergence", broken)
    monkeypatch.setattr(peers, "runs", lambda name, device: name == "trl")
    inputs, failed = make_inputs(shape), {}
    assert list(contenders(shape, inputs, compile=False, failed=failed)) == [
        "ours",
        "eager",
        "copy",
    ]
    assert failed == {"trl": "TypeError: another argument"}
    with pytest.raises(TypeError, match="another argument"):
        contenders(shape, inputs, compile=False)
    row = {"op": "kd_loss", "shape": "(1, 2)", "failed": failed}
    said = markdown.peers_list({"rows": [row]})
    assert "- trl failed at `kd_loss` (1, 2): TypeError: another argument" in said


def stand_in(monkeypatch, name, **functions):
    """A module of another library, with functions of its signatures, in the place of its own."""
    for parent in accumulate(name.split("."), "{}.{}".format):
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    vars(sys.modules[name]).update(functions)


def install_fla(monkeypatch):
    def fused_kl_div_loss(x, target_x, weight, target_weight, reduction="batchmean"):
        p, log_q = F.softmax(target_x @ target_weight.T, -1), F.log_softmax(x @ weight.T, -1)
        return F.kl_div(log_q, p, reduction=reduction)

    stand_in(monkeypatch, "fla.modules.fused_kl_div", fused_kl_div_loss=fused_kl_div_loss)


def install_liger(monkeypatch):
    def liger_kl_div(log_q, p, reduction):
        return F.kl_div(log_q, p, reduction=reduction)

    def liger_jsd(log_q, log_p, beta):
        if beta in (0, 1):
            q, p = (log_q, log_p) if beta == 0 else (log_p, log_q)
            return F.kl_div(q, p, reduction="batchmean", log_target=True)
        log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
        of_p, of_q = (
            F.kl_div(log_m, x, reduction="batchmean", log_target=True) for x in (log_p, log_q)
        )
        return beta * of_p + (1 - beta) * of_q

    functions = types.SimpleNamespace(liger_kl_div=liger_kl_div, liger_jsd=liger_jsd)
    stand_in(monkeypatch, "liger_kernel.transformers", functional=functions)


def install_k2(monkeypatch):
    def dense_fsa_vec(log_probs, segments):
        assert segments.dtype == torch.int32
        assert (segments[1:, 2] <= segments[:-1, 2]).all()  # it wants them so
        return log_probs[segments[:, 0].long()], segments[:, 2]

    def ctc_loss(graphs, dense, reduction, target_lengths):
        log_probs, lengths = dense
        labels = torch.tensor([label for graph in graphs for label in graph])
        lengths = lengths.long()
        return F.ctc_loss(
            log_probs.transpose(0, 1), labels, lengths, target_lengths, reduction=reduction
        )

    stand_in(
        monkeypatch,
        "k2",
        ctc_graph=lambda symbols, device: symbols,
        DenseFsaVec=dense_fsa_vec,
        ctc_loss=ctc_loss,
    )


STAND_INS = {"fla": install_fla, "liger": install_liger, "k2": install_k2}


@pytest.mark.parametrize("name", STAND_INS)
@pytest.mark.parametrize("shape", TINY, ids=lambda s: f"{s.op} {s.label}")
def test_a_peer_that_is_not_here_is_called_rightly(monkeypatch, name, shape):
    """By stand-ins, of the signatures and the meaning that these libraries document."""
    STAND_INS[name](monkeypatch)
    monkeypatch.setattr(peers, "runs", lambda peer, device: peer == name)
    inputs = make_inputs(shape)
    rivals = contenders(shape, inputs, compile=False, only=("ours", name))
    has_a_row = {
        "fla": shape.op == "kd_loss" and shape.divergence == "forward_kl",
        "liger": shape.op == "kd_loss",
        "k2": shape.op == "ctc_loss",
    }[name]
    assert (name in rivals) == has_a_row
    found = errors(shape, inputs, rivals)
    assert all(e["loss_relative"] < 1e-5 and not e["differs"] for e in found.values())


def test_every_operator_has_rows_and_a_benchmark_file():
    for op in OPS:
        assert any(s.op == op and s.note == "smallest call" for s in SHAPES)
        assert (ROOT / f"benchmarks/bench_{op}.py").exists()
        assert op in cells.MOVES


def test_a_peer_without_a_row_has_a_reason():
    for peer in peers.status().values():
        assert peer["version"] or peer["why_not"]


def test_a_peer_of_a_gpu_has_no_row_where_the_cpu_is_measured(monkeypatch):
    monkeypatch.setattr(peers, "peer_status", lambda name: {"version": "1", "why_not": None})
    on_cpu, on_gpu = peers.status("cpu"), peers.status("cuda")
    assert on_cpu["liger"]["why_not"] == "no row; it runs on a GPU, and the CPU is measured here"
    assert on_cpu["trl"]["why_not"] is on_gpu["liger"]["why_not"] is None
    assert on_gpu["optax"]["why_not"].startswith("no row; it runs on the CPU")


def test_plots_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    from kdkernels.bench import plots

    points = [{"x": x, "logit_bytes": 4 * x, "ours": 1e-3 * x, "eager": 0.1} for x in (1, 10)]
    sweep = {"op": "kd_loss", "axis": "rows", "others": {"C": 5}, "points": points}
    result = {"machine": {"cpu": "A", "caches": {"L2": 48}}, "scaling": [sweep]}
    drawn = plots.draw([result], tmp_path)
    assert drawn == {"benchmark-scaling.png": "Time against each size, A"}
    assert (tmp_path / "benchmark-scaling.png").read_bytes().startswith(b"\x89PNG")
