"""The GPU timings without a GPU: their order, the gate, files, tables and the command line."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT

from benchmarks import gpu_case, gpu_clock, gpu_report, gpu_rows, gpu_run, gpu_timings
from benchmarks.gpu_rows import Row, plan
from benchmarks.providers import PROVIDERS, PUBLISHED, Provider

ROWS = gpu_rows.all_rows()


def row(subject: str = "msff", provider: str = "fused-auto", **changes: Any) -> Row:
    made = Row(subject, "forward", 2, "fp32", "contiguous", provider)
    return dataclasses.replace(made, **changes)


class FakeClock:
    """Every call takes 2 ms and 3 MB; counts what it was asked to time."""

    def __init__(self) -> None:
        self.asked = 0

    def measure(self, call: Callable[[], object]) -> gpu_clock.Timing:
        self.asked += 1
        return gpu_clock.Timing(2.0, 1.9, 2.1, 7)

    def peak_bytes(self, call: Callable[[], object]) -> int:
        self.asked += 1
        return 3_000_000


def planted(name: str, wrap: Callable[..., Any]) -> dict[str, Provider]:
    """The providers, with `name` doing what `wrap(results)` makes of the published form's."""

    def build(case: Any, mode: str, threads: int) -> Any:
        good = PUBLISHED.build(case, mode, threads)
        return dataclasses.replace(good, run=lambda *inputs: wrap(good.run(*inputs)))

    return {p.name: p for p in PROVIDERS} | {name: Provider(name, False, build)}


# ------------------------------------------------------------------------------------------- plan


def test_every_row_is_planned_once_and_the_telling_ones_first() -> None:
    order = plan(ROWS)
    assert len({r.key for r in order}) == len(order) == len(ROWS)
    assert [gpu_rows.tier(r) for r in order] == sorted(map(gpu_rows.tier, ROWS))
    first = order[:30]
    assert {r.subject for r in first} <= {"ciema", "network"}
    assert first[0].key == "ciema forward b1 fp16 contiguous published"
    for index, one in enumerate(order):  # of a tier, a case's providers follow one another
        if one.is_ours and gpu_rows.tier(one) == 0:
            before = [r.provider for r in order[:index] if r.case == one.case]
            assert before[0] == "published"
    seen = {(r.mode, r.precision, r.layout, r.batch) for r in order}
    assert {batch for *_, batch in seen} == {1, 8, 32, 64}
    assert ("training", "fp16", "contiguous", 8) not in seen
    assert all(gpu_rows.row_of(r.facts()) == r for r in order[:50])


def test_rows_are_picked_by_words() -> None:
    some = plan(ROWS, ["ciema fp16 b1 forward", "msff training fused-triton"])
    assert {r.subject for r in some} == {"ciema", "msff"}
    assert all(r.precision == "fp16" and r.batch == 1 for r in some if r.subject == "ciema")
    assert {r.provider for r in some if r.subject == "msff"} == {"fused-triton"}


# ------------------------------------------------------------------------------------------- gate


def test_a_right_row_is_judged_and_timed() -> None:
    clock = FakeClock()
    bench = gpu_run.Bench("tiny", "cpu", clock)
    for mode in gpu_rows.MODES:
        facts = bench.run(row("channel_interaction", mode=mode))
        assert facts["status"] == "ok", facts
        assert (facts["ms"], facts["low"], facts["high"], facts["rounds"]) == (2.0, 1.9, 2.1, 7)
        assert facts["peak_bytes"] == 3_000_000
        assert 0 < facts["error"] < 1e-5
        assert facts["flop"] > 0
        assert facts["size"] == "2x128x8x8"
        assert "channel_interaction" in facts["backends"]
        assert "graph" not in facts
    assert clock.asked == 4


@pytest.mark.parametrize("mode", gpu_rows.MODES)
@pytest.mark.parametrize(
    ("wrap", "told"),
    [
        (lambda outs: tuple(1.001 * o for o in outs), "output 0 has relative error 1.0e-03"),
        (lambda outs: tuple(o * math.nan for o in outs), "output 0 has relative error nan"),
        (lambda outs: (), "0 outputs, expected 1"),
        (lambda outs: tuple(o[:1] for o in outs), "output 0 has shape"),
    ],
)
def test_a_wrong_row_has_no_speed(wrap: Callable[..., Any], told: str, mode: str) -> None:
    clock = FakeClock()
    bench = gpu_run.Bench("tiny", "cpu", clock, planted("fused-cuda", wrap))
    facts = bench.run(row("gated_fusion", "fused-cuda", mode=mode))
    if mode == "training" and "relative" not in told:
        assert facts["status"] in ("wrong", "failed")
    else:
        assert facts["status"] == "wrong"
        assert told in facts["reason"]
        assert facts["reason"].endswith("not timed")
    assert clock.asked == 0
    assert "ms" not in facts
    assert "peak_bytes" not in facts


def test_a_wrong_gradient_has_no_speed() -> None:
    class Leaky(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return 1.01 * grad

    clock = FakeClock()
    providers = planted("fused-cuda", lambda outs: tuple(Leaky.apply(o) for o in outs))
    bench = gpu_run.Bench("tiny", "cpu", clock, providers)
    assert bench.run(row("msff", "fused-cuda"))["status"] == "ok"
    facts = bench.run(row("msff", "fused-cuda", mode="training"))
    assert facts["status"] == "wrong"
    assert facts["reason"].startswith("gradient of ")


def test_failures_are_results_too() -> None:
    def no_memory(outs: Any) -> Any:
        raise torch.OutOfMemoryError("tried to allocate")

    def broken(outs: Any) -> Any:
        raise RuntimeError("kernel went wrong\nsecond line")

    for wrap, status, told in (
        (no_memory, "out of memory", "it does not fit"),
        (broken, "failed", "RuntimeError: kernel went wrong"),
    ):
        facts = gpu_run.Bench("tiny", "cpu", FakeClock(), planted("fused-cuda", wrap)).run(
            row("msff", "fused-cuda")
        )
        assert facts["status"] == status
        assert facts["reason"].startswith(told)
    facts = gpu_run.Bench("tiny", "cpu", FakeClock()).run(row("msff", "fused-cuda"))
    assert facts["status"] == "skipped"
    assert facts["reason"]


def test_alternatives_are_held_to_less_and_precisions_to_their_own() -> None:
    assert gpu_case.limit_of(row(), "output 0") == 1e-5
    assert gpu_case.limit_of(row(), "gradient of x") == 1e-4
    assert gpu_case.limit_of(row(precision="bf16"), "gradient of x") == 4e-2
    assert gpu_case.limit_of(row(precision="tf32"), "output 0") == 4e-3
    assert gpu_case.limit_of(row(provider="published"), "output 0") == pytest.approx(1e-4)
    assert gpu_case.limit_of(row(provider="published", precision="bf16"), "gradient") == 0.3


def test_a_call_for_the_compilers_is_not_judged() -> None:
    clock = FakeClock()
    wrong = planted("fused-cuda", lambda outs: tuple(2 * o for o in outs))
    bench = gpu_run.Bench("tiny", "cpu", clock, wrong)
    facts = bench.run(row("msff", "fused-cuda", mode="training"), compile_only=True)
    assert (facts["status"], clock.asked) == ("ok", 0)


# ------------------------------------------------------------------------------------------- files


def result(provider: str, ms: float | None, **facts: Any) -> dict[str, Any]:
    made = row("cross_spatial", provider).facts() | {"status": "ok" if ms else "wrong"}
    if ms:
        made |= {"ms": ms, "low": 0.9 * ms, "high": 1.1 * ms, "peak_bytes": 2_000_000, "error": 0.0}
    return made | facts


def store(folder: Path, **head: Any) -> gpu_timings.Store:
    head = {"sources": "abc", "scale": "tiny", "device": "cpu", **head}
    return gpu_timings.Store(folder / "deep" / "t.json", folder / "deep" / "t.md", head)


MACHINE = {"gpu": "one", "torch": "2", "triton": "3", "device": "cpu"}


def test_a_resumed_file_keeps_what_is_still_true(tmp_path: Path) -> None:
    first = store(tmp_path)
    assert "nothing to resume" in first.resume()
    first.set_machine(MACHINE)
    first.add(result("published", 4.0))
    first.add(result("published", 5.0))
    first.add(result("fused-cuda", None, status="not run", reason="time is up"))
    first.add(result("fused-triton", None, error=math.nan, reason="nan"))
    first.save()
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["t.json", "t.md"]
    content = json.loads((tmp_path / "deep" / "t.json").read_text())
    assert [r.get("ms") for r in content["rows"]] == [5.0, None, None]
    assert content["rows"][2]["error"] is None

    second = store(tmp_path)
    assert second.resume() == "2 rows are kept"
    second.set_machine(MACHINE)
    assert len(second.result["rows"]) == 2
    second.set_machine(MACHINE | {"gpu": "another"})
    assert second.result["rows"] == []
    assert "all rows anew" in store(tmp_path, sources="changed").resume()
    for text in ("", "[]", '{"rows": [{"key": 1}]}'):
        (tmp_path / "deep" / "t.json").write_text(text)
        with pytest.raises(ValueError, match="is no file of these timings"):
            store(tmp_path).resume()


def test_tables_compare_with_published_and_compiled_and_show_no_wrong_speed() -> None:
    graph = {"ms": 0.5, "low": 0.5, "high": 0.5, "rounds": 9, "equal": True}
    rows = [
        result("published", 4.0),
        result("fused-triton", None, reason="output 0 has relative error 1"),
        result("fused-cuda", 1.5, graph={"equal": False, "reason": "replay differs"}),
        result("fused-auto", 1.0, graph=graph, backends={"cross_spatial": "cuda"}),
        result("reference", 3.0),
        result("compiled", 2.0),
    ]
    text = gpu_report.timings_text({"rows": rows, "machine": {"gpu": "Test GPU"}})
    line = "| cross_spatial | fp32 | contiguous | 2 | 4 ±10% | wrong | 1.5 ±10% | 1 ±10% | 3 ±10%"
    assert f"{line} | 2 ±10% | 4.0× | 2.0× |" in text
    assert "GPU Test GPU" in text
    assert "| 0.5 ±0% |" in text
    assert "* **wrong**: cross_spatial forward b2 fp32 contiguous fused-triton: output 0" in text
    assert "* **no graph**: cross_spatial forward b2 fp32 contiguous fused-cuda: replay" in text

    (choice,) = gpu_report.auto_choices(rows)
    assert choice["ms"] == {"cuda": 1.5, "reference": 3.0}
    assert choice["not_right"] == {"triton": "wrong"}
    assert (choice["quickest"], choice["auto"]) == ("cuda", {"cross_spatial": "cuda"})
    assert gpu_timings.complaints(rows) == [rows[1]["key"], rows[2]["key"]]
    assert gpu_timings.complaints([result("published", None)]) == []
    assert "2.0× published" in gpu_timings.line_of(rows[3], 2.0)
    assert gpu_timings.line_of(rows[1], 4.0).startswith("wrong: output 0")


def test_backends_are_compared_by_their_kernels_where_all_were_replayed() -> None:
    rows = [
        result("fused-triton", 0.3, graph={"ms": 0.2, "equal": True}),
        result("fused-cuda", 0.6, graph={"ms": 0.1, "equal": True}),
    ]
    (choice,) = gpu_report.auto_choices(rows)
    assert choice["ms"] == {"cuda": 0.1, "triton": 0.2}
    rows[1]["graph"] = {"reason": "out of memory"}
    (choice,) = gpu_report.auto_choices(rows)
    assert choice["ms"] == {"cuda": 0.6, "triton": 0.3}


def test_an_empty_result_has_a_report_too() -> None:
    assert "No rows." in gpu_report.timings_text({"rows": []})


# ------------------------------------------------------------------------------------ command line


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_timings", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_tiny_run_on_the_cpu_writes_resumes_and_overwrites(tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    tiny = ("--device", "cpu", "--tiny", "--json", str(file))
    done = command(*tiny, "--only", "msff published", "--only", "msff fused-triton")
    assert done.returncode == 0, done.stdout + done.stderr
    first = json.loads(file.read_text())
    by_name = {r["provider"]: r for r in first["rows"]}
    assert by_name["published"]["ms"] > 0
    assert by_name["fused-triton"]["status"] == "skipped"
    assert first["machine"]["torch"] == torch.__version__
    assert first["sources"] == gpu_timings.sources()
    assert "| msff | fp32 | contiguous | 2 |" in file.with_suffix(".md").read_text()

    done = command(*tiny, "--only", "msff", "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 rows are kept" in done.stdout
    second = json.loads(file.read_text())
    assert [r["key"] for r in second["rows"][:2]] == [r["key"] for r in first["rows"]]
    assert second["rows"][:2] == first["rows"]
    assert len(second["rows"]) == 4
    (choice,) = second["auto_choice"]
    assert choice["subject"] == "msff"

    done = command(*tiny, "--only", "msff published")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(json.loads(file.read_text())["rows"]) == 1


def test_the_command_line_teaches_and_refuses(tmp_path: Path) -> None:
    told = command("--help").stdout
    for word in ("--resume", "--warm", "--only", "Exit status", "float64"):
        assert word in told
    listed = command("--list", "--only", "ciema b64 tf32 training published").stdout.split("\n")
    assert listed[0] == "ciema training b64 tf32 contiguous published"
    (tmp_path / "t.json").write_text("{}")
    broken = ("--device", "cpu", "--tiny", "--resume", "--json", str(tmp_path / "t.json"))
    for arguments, message in (
        (("--only", "nonsense"), "no row has all words"),
        (("--jobs", "0", "--warm"), "--jobs=0"),
        (("--seconds", "-1"), "-1 is not above 0"),
        (broken, "is no file of these timings"),
    ):
        done = command(*arguments)
        assert done.returncode == 2
        assert message in done.stderr
    assert (tmp_path / "t.json").read_text() == "{}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_run_says_so_and_leaves_a_file(tmp_path: Path) -> None:
    done = command("--json", str(tmp_path / "t.json"), "--only", "ciema fp16 b1 published")
    assert done.returncode == 2
    assert "error: torch sees no GPU" in done.stderr
    rows = json.loads((tmp_path / "t.json").read_text())["rows"]
    assert {r["status"] for r in rows} == {"not run"}


def test_compiling_ahead_times_nothing(tmp_path: Path) -> None:
    done = command("--device", "cpu", "--tiny", "--warm", "--jobs", "2", "--only", "msff")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "msff forward b2 fp32 contiguous fused-triton: skipped" in done.stdout
    assert "0 of 1 rows compiled" in done.stdout
