"""The benchmarks' own machinery: a tiny run, the gate, memory counters and the table."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT

import fused
from benchmarks import measure, memory, providers, stages, table, turns

pytest.importorskip("pytest_benchmark", reason="extra [bench] is not installed")

PLANTED = """
import dataclasses
import torch
from benchmarks import providers

def build(case, mode, threads):
    good = providers.PUBLISHED.build(case, mode, threads)
    def run(*inputs):
        return tuple(1.001 * out for out in good.run(*inputs))
    return dataclasses.replace(good, run=run)

providers.PROVIDERS[:] = [
    providers.PUBLISHED, providers.Provider("planted-wrong", True, build)
]
"""


def run_benchmarks(
    tmp_path: Path, *arguments: str, files: str = "benchmarks"
) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    result = tmp_path / "result.json"
    command = [sys.executable, "-m", "pytest", *files.split(), "-q", "-p", "no:cacheprovider"]
    command += ["--benchmark-only", "--shapes", "tiny", "--threads", "1", "--seconds", "0.01"]
    command += [f"--benchmark-json={result}", *arguments]
    # Told of xdist, pytest-benchmark refuses to time; this run is alone in its process.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    environment = inherited | {"OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(tmp_path)])
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    # pytest-benchmark leaves an empty file when nothing was timed.
    text = result.read_text() if result.exists() else ""
    return done, json.loads(text) if text else {"benchmarks": []}


def tiny(subject: str) -> stages.Case:
    return stages.Case(subject, stages.SHAPES["tiny"])


def results(provider: providers.Provider, case: stages.Case, mode: str) -> measure.Results:
    runnable = provider.build(case, mode, 1)
    return measure.results_of(runnable, case, mode != stages.FORWARD, torch.float32)


def by_name(name: str) -> providers.Provider:
    return next(p for p in providers.PROVIDERS if p.name == name)


# ------------------------------------------------------------------------------------- a tiny run


def test_a_tiny_run_gives_json_and_a_table(tmp_path: Path) -> None:
    files = "benchmarks/test_msff.py benchmarks/test_ciema.py benchmarks/test_network.py"
    done, result = run_benchmarks(tmp_path, "-k", "published or reference or auto", files=files)
    assert done.returncode == 0, done.stdout + done.stderr
    found = table.records(result)
    cells = {(r["subject"], r["provider"], r["mode"]) for r in found}
    subjects, names = ("msff", "ciema", "network"), ("published", "reference", "fused-auto")
    assert cells == {(s, n, m) for s in subjects for n in names for m in stages.MODES}
    for record in found:
        assert record["ms"] > 0
        assert record["flop"] > 0
        assert record["gflop_per_second"] == pytest.approx(record["flop"] / record["ms"] / 1e6)
        assert record["error"] <= 1e-4
        assert record["threads"] == 1
        assert (record["saved_bytes"] is None) == (record["mode"] == "forward")
    assert result["machine_info"]["versions"]["torch"] == torch.__version__

    file = tmp_path / "result.json"
    printed = subprocess.run(
        [sys.executable, "-m", "benchmarks.table", str(file)],
        *(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert printed.returncode == 0, printed.stderr
    rows = [line for line in printed.stdout.splitlines() if line.startswith("| ciema")]
    # time, rate and peak memory; saved bytes of two modes; a line a provider of the forward
    assert len(rows) == 3 + 3 + 3 + 2 + 3
    assert "## Saved for the backward" in printed.stdout


def test_k_cpu_prints_one_table_of_all_forwards(tmp_path: Path) -> None:
    names = "published or frozen"
    done, result = run_benchmarks(
        tmp_path, "-k", f"cpu and ({names})", files="benchmarks/test_gated_fusion.py"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(r["mode"] == "forward" for r in table.records(result))
    _, _, text = done.stdout.partition("inference on a CPU")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| gated_fusion")]
    found = {(row[2], row[3].strip("*")): row[4:] for row in rows}
    wanted = {("float32", "published"), ("float32", "fused-frozen")}
    if fused.backends.cpu.LIBRARY.error is not None:
        wanted = {("float32", "published")}
    else:
        wanted.add(("bfloat16", "fused-frozen-bf16"))
    assert set(found) == wanted
    for record in table.records(result):
        milliseconds, ratio, rate, share, _ = found[record["dtype"], record["provider"]]
        assert float(milliseconds) == pytest.approx(record["ms"], rel=0.02)
        assert int(rate) == round(record["gflop_per_second"])
        assert record["peak_gflop_per_second"] > 1
        expected = 100 * record["gflop_per_second"] / record["peak_gflop_per_second"]
        assert int(share.removesuffix(" %")) == round(expected)
        assert (ratio == "–") == (record["dtype"] == "bfloat16")  # nothing to compare it with


def test_turns_give_medians_and_ratios(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    command = ["--shape", "tiny", "--subjects", "cross_spatial", "--threads", "1", "2"]
    try:
        done = turns.main([*command, "--rounds", "3", "--json", str(tmp_path / "turns.json")])
    finally:
        torch.set_num_threads(threads)
    assert done == 0
    rows = json.loads((tmp_path / "turns.json").read_text())["rows"]
    names = ("published", "fused-auto", "published-autocast", "fused-autocast")
    assert [(r["threads"], r["provider"]) for r in rows] == [(t, n) for t in (1, 2) for n in names]
    assert all(len(r["seconds"]) == 3 for r in rows)
    shown = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    shown = [cells for cells in shown if cells[0] == "cross_spatial"]
    medians = [1e3 * statistics.median(r["seconds"]) / 2 for r in rows]  # two samples
    assert [float(cells[6]) for cells in shown] == pytest.approx(medians, rel=0.01)
    for published, ours in ((0, 1), (2, 3), (4, 5), (6, 7)):
        ratio = medians[published] / medians[ours]
        assert float(shown[ours][8].strip("×")) == pytest.approx(ratio, rel=0.01, abs=0.006)
    scaling = medians[1] / medians[5]
    assert float(shown[5][9].strip("×")) == pytest.approx(scaling, rel=0.01, abs=0.006)


def test_turns_refuse_wrong_results(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(case: stages.Case, mode: str, threads: int) -> providers.Runnable:
        right = by_name("fused-auto").build(case, mode, threads)
        return providers.Runnable(
            lambda *inputs: tuple(1.2 * y for y in right.run(*inputs)), right.module
        )

    for name in ("fused-auto", "fused-autocast"):
        planted = dataclasses.replace(turns.BY_NAME[name], build=wrong)
        monkeypatch.setitem(turns.BY_NAME, name, planted)
        command = ["--shape", "tiny", "--subjects", "cross_spatial", "--providers", name]
        assert turns.main([*command, "--rounds", "1"]) == 1
        out, err = capsys.readouterr()
        assert "cross_spatial |" not in out
        assert f"error: cross_spatial: {name}: output" in err


def test_a_planted_wrong_provider_is_not_timed(tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text(PLANTED)
    done, result = run_benchmarks(
        tmp_path, "-p", "planted", files="benchmarks/test_gated_fusion.py"
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "planted-wrong: output 0 has relative error 1.0e-03" in done.stdout
    assert {r["provider"] for r in table.records(result)} == {"published"}


def test_bad_options_are_refused(tmp_path: Path) -> None:
    done, result = run_benchmarks(tmp_path, "--threads", "0", files="benchmarks/test_msff.py")
    assert done.returncode == 4
    assert "--threads=0" in done.stderr
    assert result["benchmarks"] == []


# ------------------------------------------------------------------------------------------- gate


@pytest.mark.parametrize("mode", [stages.FORWARD, stages.BOTH])
@pytest.mark.parametrize("subject", stages.SUBJECTS)
def test_published_and_op_forms_pass_the_gate(subject: str, mode: str) -> None:
    case = tiny(subject)
    want = measure.oracle(case, mode != stages.FORWARD)
    assert (len(want.gradients) > 0) == (mode == stages.BOTH)
    for name in ("published", "reference", "fused-auto"):
        got = results(by_name(name), case, mode)
        assert measure.gate(name, got, want) <= 1e-4


@pytest.mark.parametrize("subject", ["coordinate_attention", "gated_fusion"])
@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "openvino-bf16"])
def test_runtimes_pass_the_gate(subject: str, name: str) -> None:
    case, provider = tiny(subject), by_name(name)
    reason = provider.why_not(case, stages.FORWARD)
    if reason is not None:
        pytest.skip(reason)
    runnable = provider.build(case, stages.FORWARD, 1)
    got = measure.results_of(runnable, case, False, torch.float32)
    measure.gate(name, got, measure.oracle(case, False), provider.dtype)
    runtime = name.removesuffix("-bf16")
    assert provider.why_not(case, stages.BOTH) == f"{runtime} does not train"
    if runnable.peak_bytes is not None:
        assert runnable.peak_bytes > 0


@pytest.mark.parametrize("subject", stages.SUBJECTS)
@pytest.mark.parametrize("name", ["fused-frozen", "fused-frozen-bf16"])
def test_frozen_forms_pass_the_gate(subject: str, name: str) -> None:
    case, provider = tiny(subject), by_name(name)
    reason = provider.why_not(case, stages.FORWARD)
    if reason is not None:
        pytest.skip(reason)
    got = results(provider, case, stages.FORWARD)
    measure.gate(name, got, measure.oracle(case, False), provider.dtype)
    assert provider.why_not(case, stages.BOTH) == "the frozen form does not train"
    if provider.dtype == torch.bfloat16:  # it is not float32 by mistake
        with pytest.raises(measure.GateError):
            measure.gate(name, got, measure.oracle(case, False))


def test_gate_refuses_wrong_outputs_and_gradients() -> None:
    case = tiny("channel_interaction")
    want = measure.oracle(case, True)
    got = results(providers.PUBLISHED, case, stages.BOTH)
    measure.gate("right", got, want)

    wrong = dataclasses.replace(got, outputs=tuple(o * 1.0001 for o in got.outputs))
    with pytest.raises(measure.GateError, match="output 0"):
        measure.gate("wrong", wrong, want)
    nothing = dataclasses.replace(got, outputs=tuple(o * math.nan for o in got.outputs))
    with pytest.raises(measure.GateError, match="nan"):
        measure.gate("wrong", nothing, want)
    shorter = dataclasses.replace(got, outputs=())
    with pytest.raises(measure.GateError, match="0 outputs, expected 1"):
        measure.gate("wrong", shorter, want)
    flat = dataclasses.replace(got, outputs=tuple(o.flatten() for o in got.outputs))
    with pytest.raises(measure.GateError, match="shape"):
        measure.gate("wrong", flat, want)
    for key in want.gradients:
        gradients = got.gradients | {key: got.gradients[key] * 1.01}
        with pytest.raises(measure.GateError, match=f"gradient of {key}"):
            measure.gate("wrong", dataclasses.replace(got, gradients=gradients), want)
        gradients = {k: g for k, g in got.gradients.items() if k != key}
        with pytest.raises(measure.GateError, match="no gradient"):
            measure.gate("wrong", dataclasses.replace(got, gradients=gradients), want)


# ------------------------------------------------------------------------------------------ cases


def test_flop_of_the_paper() -> None:
    # spec.md 4: 58.3 GFLOP in the published form, MSFF 10.7, CIEMA 44.6.
    paper = stages.SHAPES["paper"]
    network = stages.Case("network", paper)
    # The figures come from shapes alone: an empty network stands in for the calibrated one.
    with torch.device("meta"):
        model = stages.MobileSteelNet()
    for subject, gflop in (("network", 58.3), ("msff", 10.7), ("ciema", 44.6)):
        case = dataclasses.replace(network, subject=subject)
        case.__dict__["_network"] = (model, [])
        assert case.flop(stages.FORWARD, published=True) / 1e9 == pytest.approx(gflop, abs=0.06)
        assert case.flop(stages.BOTH, published=False) > case.flop(stages.BACKWARD, published=False)


def test_explicit_backend_says_why_it_cannot_run() -> None:
    assert "cuda" in (by_name("fused-cuda").why_not(tiny("ciema"), stages.FORWARD) or "")
    assert by_name("fused-auto").why_not(tiny("ciema"), stages.FORWARD) is None
    chosen = providers.chosen_backends(tiny("ciema"), stages.BOTH)
    assert list(chosen)[:2] == ["channel_interaction", "channel_interaction_backward"]
    assert len(chosen) == 8


# ----------------------------------------------------------------------------------------- memory


def test_peak_counts_what_lives_at_once_and_forgets_the_last_call() -> None:
    size = 64 * 2**20

    def twice() -> None:
        first = torch.ones(size // 4)
        (first + first).max()

    peak = memory.peak_of(twice)
    if peak is None:
        pytest.skip("the kernel's peak counter cannot be reset here")
    assert 1.95 * size <= peak < 2.5 * size  # a page may be resident already
    small = memory.peak_of(lambda: torch.ones(1024))
    assert small is not None
    assert small < size / 4


def test_peak_counts_what_is_kept_from_before() -> None:
    size, kept = 32 * 2**20, []
    peak = memory.peak_of(
        lambda: torch.ones(size // 4).max(),
        before=lambda: kept.append(torch.ones(size // 4)),
    )
    if peak is None:
        pytest.skip("the kernel's peak counter cannot be reset here")
    assert 1.95 * size <= peak < 2.5 * size  # a page may be resident already


def test_the_command_tells_the_peaks_of_each_provider(capfd: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "benchmarks.memory", "--shape", "tiny", "--calls", "2"]
    names = ["fused-auto", "fused-frozen"]
    subprocess.run([*command, "--providers", *names], check=True, cwd=ROOT)
    lines = capfd.readouterr().out.splitlines()
    for name, line in zip(names, lines, strict=True):
        peaks = re.fullmatch(rf"network \S+ {name}: ([\d.]+|unknown)  ([\d.]+|unknown) MB", line)
        assert peaks is not None, line


def test_saved_bytes_count_each_storage_once_and_no_parameters() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(8, 8))

    def forward() -> torch.Tensor:
        y = x @ weight  # keeps x and weight
        return y * y.view(-1).reshape(4, 8)  # keeps y twice

    assert memory.saved_bytes(forward, [weight]) == 2 * 4 * 8 * 4


# ------------------------------------------------------------------------------------------ table


def entry(provider: str, seconds: float, **facts: Any) -> dict[str, Any]:
    info = {"subject": "ciema", "size": "1x8x4x4", "mode": "forward", "provider": provider}
    info |= {"flop": 2 * 10**9, "peak_bytes": 5_000_000, "saved_bytes": None} | facts
    return {"name": provider, "extra_info": info, "stats": {"median": seconds}}


def test_table_compares_with_the_best_alternative() -> None:
    entries = [entry("published", 0.4), entry("openvino", 0.2), entry("fused-auto", 0.1)]
    text = table.markdown({"benchmarks": entries})
    assert "| ciema | 1x8x4x4 | forward | 400 (0.50×) | **200 (1.00×)** | 100 (2.00×) |" in text
    assert "| ciema | 1x8x4x4 | forward | 5.0 | 10.0 | 20.0 |" in text
    assert "| ciema | 1x8x4x4 | float32 | **openvino** | 200 | 1.00× | 10 | – | 5.0 |" in text


def test_table_compares_within_a_dtype() -> None:
    half = {"dtype": "bfloat16", "peak_gflop_per_second": 80.0}
    entries = [entry("openvino", 0.4), entry("openvino-bf16", 0.1, **half)]
    entries += [entry("fused-frozen", 0.2), entry("fused-frozen-bf16", 0.05, **half)]
    text = table.markdown({"benchmarks": entries})
    assert "| **400 (1.00×)** | **100 (1.00×)** | 200 (2.00×) | 50 (2.00×) |" in text
    assert (
        "| ciema | 1x8x4x4 | bfloat16 | fused-frozen-bf16 | 50 | 2.00× | 40 | 50 % | 5.0 |" in text
    )
    assert "Saved for the backward" not in text


def test_table_tells_every_backend_that_ran() -> None:
    entries = [entry("fused-auto", 0.1, backends={"a": "cpu"})]
    entries += [entry("fused-auto", 0.2, size="2x8x4x4", backends={"a": "reference", "b": "cpu"})]
    assert "ran: a cpu and reference, b cpu." in table.markdown({"benchmarks": entries})


def test_table_refuses_foreign_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "other.json"
    stopped = json.dumps({"benchmarks": [entry("published", 0.0)]})
    torn = json.dumps({"benchmarks": [{"extra_info": {"subject": "x"}, "stats": {"median": 1}}]})
    other = '{"benchmarks": [{"name": "other", "stats": {"median": 1}}]}'
    for content in ("", "{}", "[]", other, stopped, torn):
        file.write_text(content)
        assert table.main([str(file)]) == 1
        assert "error:" in capsys.readouterr().err
    assert table.main([str(tmp_path / "missing.json")]) == 1
