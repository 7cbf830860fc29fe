"""What "auto" takes on a GPU: read from measurements, written by a command, empty until then."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_choice as command
from benchmarks.gpu_rows import Row
from fused.backends import cuda, gpu_choice
from fused.backends.gpu_choice import Measured

ROW = Measured("A GPU", "9.0", "msff", False, "float16", 3136, "triton")


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> list[Measured]:
    """Measurements that the package then has."""
    rows = [
        *(ROW, replace(ROW, pixels=100352, quickest="cuda")),
        *(replace(ROW, capability="8.6", quickest="cuda"), replace(ROW, backward=True)),
    ]
    monkeypatch.setattr(gpu_choice, "_shipped", lambda: rows)
    return rows


def timings(tmp_path: Path, **changes: Any) -> Path:
    """A result file: cuda quicker at batch 1, triton at batch 32, tf32 not of interest."""
    rows = []
    for batch, cuda_ms in ((1, 1.0), (32, 9.0)):
        for provider, ms in (("fused-cuda", cuda_ms), ("fused-triton", 4.0), ("reference", 0.5)):
            for precision in ("fp16", "tf32"):
                row = Row("msff", "forward", batch, precision, "contiguous", provider)
                rows.append(row.facts() | {"status": "ok", "ms": ms, "size": "any"})
    machine = {"gpu": "A GPU", "capability": "9.0"}
    file = tmp_path / "timings.json"
    file.write_text(json.dumps({"machine": machine, "scale": "paper", "rows": rows} | changes))
    return file


def test_the_shipped_table_can_be_read() -> None:
    assert all(row.quickest in ("cuda", "triton") for row in gpu_choice.read())


def test_the_closest_measurement_counts(known: list[Measured]) -> None:
    def at(pixels: int, capability: str = "9.0", op: str = "msff") -> str | None:
        x = torch.empty(1, 8, 1, pixels, dtype=torch.float16, device="meta")
        found = gpu_choice.quickest(op, x, capability)
        return None if found is None else found.quickest

    assert (at(3136), at(12544), at(50000), at(10**7)) == ("triton", "triton", "cuda", "cuda")
    assert at(3136, "8.6") == "cuda"
    assert at(3136, "12.0") in ("cuda", "triton")  # not measured there: the others' count
    assert at(3136, op="msff_backward") == "triton"
    assert at(3136, op="gated_fusion") is None
    x = torch.empty(1, 8, 1, 3136, device="meta")
    assert gpu_choice.quickest("msff", x, "9.0") is None
    known.append(replace(ROW, stage="gated_fusion"))
    half = gpu_choice.quickest("gated_fusion", x.bfloat16(), "9.0")
    assert half is known[-1]  # float16's
    known.append(replace(ROW, stage="gated_fusion", dtype="bfloat16", pixels=10**6))
    assert gpu_choice.quickest("gated_fusion", x.bfloat16(), "9.0") is known[-1]


def test_auto_passes_over_cuda_where_triton_was_quicker(
    known: list[Measured], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    x = torch.empty(1, 8, 56, 56, dtype=torch.float16, device="meta")
    monkeypatch.setattr(cuda.triton, "can_run", lambda op, x: None)
    reason = cuda.passed_over("msff", x)
    assert reason == "triton was quicker for 3136 pixels of float16 on A GPU"
    assert cuda.passed_over("msff", x.expand(32, -1, -1, -1)) is None
    assert cuda.passed_over("gated_fusion", x) is None
    known.append(replace(ROW, stage="gated_fusion"))
    assert cuda.passed_over("gated_fusion_mean", x) is not None
    monkeypatch.setattr(cuda.triton, "can_run", lambda op, x: "Triton is not installed")
    assert cuda.passed_over("msff", x) is None  # or the reference would run


def test_command_notes_the_quicker_gpu_backend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "choice.json"
    other, stays = replace(ROW, capability="8.6"), replace(ROW, stage="gated_fusion")
    before = [vars(row) for row in (ROW, other, stays)]
    file.write_text(json.dumps({"format": 1, "measured": before}))
    monkeypatch.setattr(command, "FILE", file)
    monkeypatch.setattr(command, "read", lambda: gpu_choice.read(file))
    assert command.main([str(timings(tmp_path)), "--write"]) == 0
    assert "msff forward float16 3136 pixels: cuda" in capsys.readouterr().out
    want = [
        *(other, stays, replace(ROW, quickest="cuda")),
        replace(ROW, pixels=100352, quickest="triton"),
    ]
    assert list(gpu_choice.read(file)) == want


def test_msff_in_training_is_ranked_by_what_the_network_takes_beyond_ciema() -> None:
    ms = {"ciema": {"cuda": 41.0, "triton": 68.0}, "network": {"cuda": 90.0, "triton": 88.0}}

    def facts(subject: str, backend: str, ms: float, status: str = "ok") -> dict[str, Any]:
        row = Row(subject, "training", 32, "bf16", "contiguous", f"fused-{backend}")
        return row.facts() | {"status": status, "ms": ms, "size": "any"}

    rows = [facts(s, backend, t) for s, times in ms.items() for backend, t in times.items()]
    result = {"machine": {"gpu": "A GPU", "capability": "9.0"}, "scale": "paper"}
    want = replace(ROW, backward=True, dtype="bfloat16", pixels=100352)
    assert command.measured(result | {"rows": rows}) == [want]
    # Timed itself, it counts itself; with a wrong row there is nothing to compare.
    own = [*rows, facts("msff", "cuda", 1.0), facts("msff", "triton", 2.0)]
    assert command.measured(result | {"rows": own}) == [replace(want, quickest="cuda")]
    assert (
        command.measured(result | {"rows": [*rows[:3], facts("network", "triton", 1, "wrong")]})
        == []
    )


def test_command_refuses_what_is_no_gpu_timing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([str(timings(tmp_path, machine={"device": "cpu"}))]) == 2
    assert "not of a CUDA device" in capsys.readouterr().err
    assert command.main([str(tmp_path / "nothing.json")]) == 2


@pytest.mark.parametrize("content", ["", "{}", '{"format": 2, "measured": []}', "[]"])
def test_a_broken_table_is_named(tmp_path: Path, content: str) -> None:
    file = tmp_path / "choice.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"choice\.json is no table of choices"):
        gpu_choice.read(file)
