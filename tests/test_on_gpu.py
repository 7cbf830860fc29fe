"""benchmarks/on_gpu.sh without a GPU: the plan, and how it treats steps that fail or hang."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from benchmarks import gpu_check, gpu_report

if shutil.which("bash") is None or shutil.which("timeout") is None:
    pytest.skip("bash and timeout are needed", allow_module_level=True)

STEPS = [
    *("machine", "build", "doctor", "tests-reference", "tests-cuda", "tests-triton"),
    *("tests-modules", "timings", "choice", "tests-strides", "tests-ops"),
]
# These run while the tests do.
BESIDE = [
    *("check", "memcheck-cuda", "memcheck-triton", "racecheck-cuda", "racecheck-triton"),
]
# A python that reports and notes down for real, says that there is a GPU, and does every other
# step as the file SCENARIO tells: lines of a pattern, tab, and what the shell is to do.
STUB = """#!/usr/bin/env bash
case "$*" in
  - | "-c import xdist") [ "$1" = - ] && echo 9.0; exit 0 ;;
  -\\ * | *gpu_report*) exec {python} "$@" ;;
esac
while IFS=$'\\t' read -r pattern action; do
  if [[ "$*" == *$pattern* ]]; then eval "$action"; fi
done <{scenario}
echo "did $*"
"""


def run(
    folder: Path, *arguments: str, **environment: str
) -> tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]]:
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "on_gpu.sh"), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    files = list(folder.rglob("steps.jsonl"))
    return done, gpu_report.read_steps(files[0].read_text()) if files else []


def prepare(folder: Path, scenario: dict[str, str]) -> Path:
    """The stub that acts out a scenario."""
    told, stub = folder / "scenario", folder / "python"
    told.write_text("".join(f"{pattern}\t{action}\n" for pattern, action in scenario.items()))
    stub.write_text(STUB.format(python=sys.executable, scenario=told))
    stub.chmod(0o755)
    return stub


def run_stubbed(
    folder: Path, scenario: dict[str, str], *arguments: str
) -> tuple[subprocess.CompletedProcess[str], dict[str, dict[str, Any]]]:
    """All steps, done by the stub; steps by name."""
    stub = prepare(folder, scenario)
    done, steps = run(folder, *arguments, "results", PYTHON=str(stub))
    assert [step["step"] for step in steps if step["step"] not in BESIDE] == STEPS
    return done, {step["step"]: step for step in steps}


# --------------------------------------------------------------------------------------- dry run


def test_a_dry_run_lists_the_steps_and_writes_an_empty_report(tmp_path: Path) -> None:
    done, steps = run(tmp_path, "--dry-run", "results")
    assert done.returncode == 0, done.stderr
    planned = [*STEPS[:3], *BESIDE, *STEPS[3:]]
    assert [step["step"] for step in steps] == planned
    assert {step["status"] for step in steps} == {"planned"}
    assert sorted(p.name for p in (tmp_path / "results").iterdir()) == [
        *("log.txt", "report.md", "steps.jsonl")
    ]
    report = (tmp_path / "results" / "report.md").read_text()
    assert "| timings | planned |" in report
    assert "Nothing was timed." in report
    listed = [line.split()[0] for line in done.stdout.splitlines() if " at most " in line]
    assert listed == planned
    assert re.search(r"tests-triton .*-k gpu-triton and not strided", done.stdout)


def test_the_folder_comes_from_the_argument_out_or_a_default(tmp_path: Path) -> None:
    for name, environment in (("named", {"OUT": str(tmp_path / "named")}), ("gpu-results", {})):
        environment = {"OUT": "", **environment}
        assert run(tmp_path, "--dry-run", **environment)[0].returncode == 0
        assert (tmp_path / name / "report.md").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dryrun",), "unknown option --dryrun"),
        (("--seconds",), "--seconds needs a number"),
        (("--seconds", "x"), "--seconds x is not a whole number above 0"),
        (("--seconds", "0"), "--seconds 0 is not a whole number above 0"),
        (("a", "b"), "more than one folder: a and b"),
    ],
)
def test_bad_arguments_are_refused(
    arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    done, steps = run(tmp_path, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert steps == []
    assert list(tmp_path.iterdir()) == []


def test_without_a_gpu_or_python_it_says_so(tmp_path: Path) -> None:
    done, _ = run(tmp_path, "results", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "torch sees no GPU" in done.stderr
    done, _ = run(tmp_path, "other", PYTHON="python-that-is-not-there")
    assert done.returncode == 2
    assert "PYTHON=python-that-is-not-there is not there" in done.stderr


def test_help_tells_what_is_written(tmp_path: Path) -> None:
    done, _ = run(tmp_path, "--help")
    assert done.returncode == 0
    for word in ("--dry-run", "--seconds", "report.md", "timings.json", "Exit status"):
        assert word in done.stdout


# ----------------------------------------------------------------------------------------- steps


def test_all_steps_pass(tmp_path: Path) -> None:
    done, steps = run_stubbed(tmp_path, {})
    assert done.returncode == 0, done.stdout + done.stderr
    assert {step["status"] for step in steps.values()} == {"passed"}
    results = tmp_path / "results"
    assert sorted(p.name for p in results.iterdir()) == ["log.txt", "report.md", "steps.jsonl"]
    log = (results / "log.txt").read_text()
    assert log.index("did -m benchmarks.gpu_check --quick") < log.index("== compiled ahead")
    # Less than the limit, so that the tables are written before it; 540 s leave it the most.
    command = next(line for line in log.splitlines() if "gpu_timings --json" in line)
    assert command.split("--seconds ")[1] == "308"
    assert "FUSED_BUILD=auto TORCH_CUDA_ARCH_LIST=9.0" in steps["build"]["command"]


def test_a_failed_step_is_noted_and_the_rest_goes_on(tmp_path: Path) -> None:
    scenario = {
        "setup.py": "echo no compiler; exit 3",
        "-k gpu-triton and not": "echo 'FAILED tests/test_stages.py'; echo '1 failed'; exit 1",
        "-k gpu-cuda": "exit 5",
        "cuda --tool memcheck": "echo compute-sanitizer is not on PATH; exit 2",
    }
    done, steps = run_stubbed(tmp_path, scenario)
    assert done.returncode == 1
    found = {name: step["status"] for name, step in steps.items() if step["status"] != "passed"}
    assert found == {
        "build": "failed (3)",
        "tests-triton": "failed (1)",
        "tests-cuda": "nothing to run",
        "memcheck-cuda": "could not run",
    }
    assert steps["build"]["told"] == "no compiler"
    assert "| tests-triton | failed (1) |" in done.stdout
    # A build that fails, no test and no tool are not wrong results.
    del scenario["-k gpu-triton and not"]
    done, _ = run_stubbed(tmp_path, scenario)
    assert done.returncode == 0


@pytest.mark.parametrize("step", ["timings", "memcheck-triton"])
def test_a_wrong_result_fails_the_run(step: str, tmp_path: Path) -> None:
    pattern = "gpu_timings --json" if step == "timings" else "triton --tool memcheck"
    done, steps = run_stubbed(tmp_path, {pattern: "exit 1"})
    assert done.returncode == 1
    assert steps[step]["status"] == "failed (1)"
    assert "something was wrong" in done.stdout


@pytest.mark.slow
def test_a_step_that_hangs_ends_at_its_limit(tmp_path: Path) -> None:
    scenario = {
        "gpu-reference": "sleep 100",
        "cuda --tool racecheck": "echo '========= Error: Race reported between'; sleep 100",
    }
    # A sixth of the 540 seconds: 10 for the reference's tests, 40 for racecheck.
    done, steps = run_stubbed(tmp_path, scenario, "--seconds", "90")
    assert steps["tests-reference"]["status"] == "ran out of time"
    assert steps["tests-reference"]["seconds"] <= 15
    assert steps["racecheck-cuda"]["status"] == "failed, then ran out of time"
    assert steps["tests-ops"]["status"] == "passed"
    assert done.returncode == 1


def test_what_there_is_no_time_for_is_said(tmp_path: Path) -> None:
    done, steps = run_stubbed(tmp_path, {"did": "true"}, "--seconds", "20")
    assert steps["build"]["status"] == "no time left"
    assert steps["timings"]["status"] == "passed"
    assert done.returncode == 0


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_ends_its_step_and_reports(sent: signal.Signals, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    stub = prepare(tmp_path, {"setup.py": f"echo $$ >{pid}; sleep 100"})
    process = subprocess.Popen(
        ["bash", str(ROOT / "benchmarks" / "on_gpu.sh"), "results"],
        cwd=tmp_path,
        env={**os.environ, "PYTHON": str(stub)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # A shell's background job ignores Ctrl-C, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not (pid.exists() and pid.read_text().strip()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(sent)
    assert process.wait(timeout=30) == 130
    time.sleep(0.5)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    assert "| machine | passed |" in (tmp_path / "results" / "report.md").read_text()


# ----------------------------------------------------------------------------------- the checker


def test_the_sanitizer_watches_our_kernels_and_its_finding_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    names = gpu_check.kernel_names()
    assert {"forward_rows_kernel", "channel_statistics_forward_kernel"} <= set(names)
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\nexit $CODE\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    arguments = ["--tool", "racecheck", "--backends", "triton", "--quick", "--stages"]
    for code, expected in (("0", 0), (str(gpu_check.FOUND), 1), ("255", 2)):
        monkeypatch.setenv("CODE", code)
        assert gpu_check.main([*arguments, "msff"]) == expected
    told = capfd.readouterr().out.splitlines()
    assert told[told.index("--tool") + 1] == "racecheck"
    assert told[told.index("--kernel-regex") + 1] == "kns=" + "|".join(names)
    inner = told[told.index("benchmarks.gpu_check") : told.index("msff") + 1]
    assert inner[1:] == ["--device", "cuda", "--quick", "--backends", "triton", "--stages", "msff"]
    # What breaks the tool in one stage is no finding, and the next stage is checked all the same.
    tool.write_text(
        '#!/usr/bin/env bash\n[[ "$*" != *msff ]] && exit $CODE\n'
        'echo "========= Internal Sanitizer Error: no"; exit 99\n'
    )
    for code, expected in (("0", 2), (str(gpu_check.FOUND), 1)):
        monkeypatch.setenv("CODE", code)
        assert gpu_check.main([*arguments, "msff", "gated_fusion"]) == expected
    tool.write_text(
        tool.read_text().replace("echo ", "echo '========= Error: Race here'; echo ", 1)
    )
    assert gpu_check.main([*arguments, "msff"]) == 1  # a race before it broke
    assert "racecheck itself or the check under it failed" in capfd.readouterr().out


def test_the_checker_says_when_nothing_can_run(capfd: pytest.CaptureFixture[str]) -> None:
    rows = gpu_check.rows(["cuda"], ["contiguous"])[:1]
    assert gpu_check.check(rows, "cpu") == 2
    assert "skipped: msff fused-cuda: " in capfd.readouterr().out
    assert len(gpu_check.rows(gpu_check.BACKENDS)) == 2 * 5 * 2 * 2 * 2


def test_a_report_of_broken_files_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, content in (("steps.jsonl", "{"), ("timings.json", "[]")):
        (tmp_path / name).write_text(content)
        assert gpu_report.main([str(tmp_path)]) == 1
        assert "error: " in capfd.readouterr().err
        (tmp_path / name).unlink()
    (tmp_path / "steps.jsonl").write_text(json.dumps({"step": "build"}) + "\n")
    assert gpu_report.main([str(tmp_path)]) == 1
    (tmp_path / "steps.jsonl").unlink()
    assert gpu_report.main([str(tmp_path)]) == 0
    assert "No step was run." in (tmp_path / "report.md").read_text()
