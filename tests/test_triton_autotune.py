"""FUSED_TRITON_AUTOTUNE: which candidate wins, what is remembered, and a cache that is broken."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT

pytest.importorskip("triton", reason="Triton is not installed")

from fused.backends.triton import autotune, configs, launch

ROOM = 100_000
WIDE, NARROW = configs.Config({"BLOCK": 128}, 8), configs.Config({"BLOCK": 64})
TINY, HUGE = configs.Config({"BLOCK": 32}), configs.Config({"BLOCK": 256}, shared_bytes=ROOM + 1)


class Kernel:
    """Stands for a jit function: remembers the block sizes that it is launched with."""

    def __init__(self, name: str) -> None:
        self.__name__, self.blocks = name, []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: self.blocks.append(options["BLOCK"])


class Op:
    """A launcher of two kernels, and a clock that knows how long each block size takes."""

    def __init__(self, times: dict[int, float]) -> None:
        self.times, self.timed = times, []
        self.kernels = [Kernel("first"), Kernel("second")]

    def __call__(self, x: torch.Tensor, *others: object) -> tuple[int, ...]:
        for kernel in self.kernels:
            config = configs.choose(kernel.__name__, x, x.numel())
            launch.launch(kernel, (1,), x, config=config)
        return tuple(kernel.blocks[-1] for kernel in self.kernels)

    def timer(self, call: Callable[[], Any]) -> float:
        time = sum(self.times[block] for block in call())
        self.timed.append(time)
        return time


@pytest.fixture(autouse=True)
def _table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    table = {
        ("first", "single"): (WIDE, NARROW, TINY),
        ("second", "single"): (WIDE, HUGE),
        ("unused", "single"): (TINY,) * 7,
    }
    monkeypatch.setattr(configs, "TABLE", table)
    monkeypatch.setenv(autotune.CACHE_VARIABLE, str(tmp_path / "deep" / "cache.json"))
    autotune.forget()
    yield
    autotune.forget()


X = torch.zeros(1, 8, 2, 2)
TIMES = {128: 3.0, 64: 1.0, 32: 2.0, 256: 0.0}


def test_the_quickest_candidate_that_fits_wins() -> None:
    op = Op(TIMES)
    # Untuned and index 0: 128 and 128; index 1 would need HUGE; index 2: 32 and 128.
    assert autotune.tune("op", op, [X], ROOM, op.timer) == 2
    assert op.timed == [6.0, 6.0, 5.0]
    assert autotune.tune("op", op, [X], ROOM + 1, op.timer) == 1


def test_untuned_stays_where_it_is_quickest_or_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    op = Op({**TIMES, 32: 9.0, 64: 9.0})
    assert autotune.tune("op", op, [X], ROOM, op.timer) is None
    monkeypatch.setitem(configs.TABLE, ("first", "single"), (WIDE,))
    monkeypatch.setitem(configs.TABLE, ("second", "single"), (NARROW,))
    op.timed.clear()
    assert autotune.tune("op", op, [X], ROOM, op.timer) is None
    assert op.timed == []


def test_a_candidate_that_does_not_run_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    op = Op(TIMES)

    def timer(call: Callable[[], Any]) -> float:
        if call()[0] == 32:
            raise RuntimeError("out of resource: registers")
        return op.timer(call)

    assert autotune.tune("op", op, [X], ROOM, timer) is None
    assert "candidate 2 does not run and is left out: out of resource" in caplog.text


def test_keys_tell_what_matters_apart_and_nothing_else() -> None:
    def key(*args: object) -> str:
        return autotune.key_of("op", args, autotune._largest(args))

    same = key(X, 4, True, 1e-5, [X])
    assert same == key(torch.ones_like(X), 4, True, 1e-3, [X + 1])
    assert same.startswith("op cpu float32 1x8x2x2 ")
    channels_last = X.contiguous(memory_format=torch.channels_last)
    others = [
        key(X, 8, True, 1e-5, [X]),
        key(X, 4, False, 1e-5, [X]),
        key(X, 4, True, 1e-5, [X, X]),
        key(X, 4, True, 1e-5, None),
        key(X.half(), 4, True, 1e-5, [X]),
        key(channels_last, 4, True, 1e-5, [X]),
        key(torch.zeros(2, 8, 2, 2), 4, True, 1e-5, [X]),
    ]
    assert len({same, *others}) == 1 + len(others)


class Device:
    """Makes a CPU tensor pass for one of a GPU, as far as the tuner asks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, timer: Callable[..., float]) -> None:
        self.capturing = False
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.cuda, "device", lambda device: launch.contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Test GPU")
        monkeypatch.setattr(autotune, "_milliseconds", timer)
        monkeypatch.setattr(configs, "shared_bytes", lambda device: ROOM)
        monkeypatch.setattr(launch.Launch, "run", lambda one: one.kernel[one.grid](**one.options))


class OnGpu(torch.Tensor):
    device = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> tuple[Op, Device, torch.Tensor]:
    op = Op(TIMES)
    return op, Device(monkeypatch, op.timer), X.as_subclass(OnGpu)


def test_winners_are_kept_in_memory_and_in_the_file(
    gpu: tuple[Op, Device, torch.Tensor], tmp_path: Path
) -> None:
    op, _, x = gpu
    assert autotune.run("op", op, [x]) == (32, 128)
    tuned = len(op.timed)
    assert tuned == 3
    assert autotune.run("op", op, [x]) == (32, 128)
    content = json.loads(autotune.cache_file().read_text())
    ((key, winner),) = content["entries"].items()
    assert key.startswith("op Test GPU float32 1x8x2x2 ")
    assert winner == 2
    autotune.forget()  # as a new process would start
    assert autotune.run("op", op, [x]) == (32, 128)
    assert len(op.timed) == tuned
    assert autotune.run("other", op, [x]) == (32, 128)
    assert len(json.loads(autotune.cache_file().read_text())["entries"]) == 2
    assert [p.name for p in autotune.cache_file().parent.iterdir()] == ["cache.json"]


def test_another_table_starts_anew(
    gpu: tuple[Op, Device, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    op, _, x = gpu
    autotune.run("op", op, [x])
    autotune.forget()
    monkeypatch.setitem(configs.TABLE, ("first", "single"), (TINY, NARROW, WIDE))
    assert autotune.run("op", op, [x]) == (32, 128)
    assert len(op.timed) == 3 + 3
    assert list(json.loads(autotune.cache_file().read_text())["entries"].values()) == [None]


def test_nothing_is_timed_while_a_graph_is_captured(
    gpu: tuple[Op, Device, torch.Tensor],
) -> None:
    op, device, x = gpu
    device.capturing = True
    assert autotune.run("op", op, [x]) == (128, 128)
    assert op.timed == []
    device.capturing = False
    assert autotune.run("op", op, [x]) == (32, 128)
    device.capturing = True
    assert autotune.run("op", op, [x]) == (32, 128)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"entries": 3}', "\x00", '{"entries": {"a": "b"}}'],
)
def test_a_corrupt_cache_is_told_once_and_replaced(
    content: str, gpu: tuple[Op, Device, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    op, _, x = gpu
    autotune.cache_file().parent.mkdir()
    if content.endswith('"b"}}'):
        content = json.dumps({**autotune._header(), "entries": {"a": "b"}})
    autotune.cache_file().write_text(content)
    with caplog.at_level(logging.WARNING, logger="fused"):
        assert autotune.run("op", op, [x]) == (32, 128)
        assert autotune.run("other", op, [x]) == (32, 128)
    assert len([r for r in caplog.records if "is no cache of winners" in r.message]) == 1
    assert len(json.loads(autotune.cache_file().read_text())["entries"]) == 2


def test_an_unwritable_cache_is_told_once_and_ignored(
    gpu: tuple[Op, Device, torch.Tensor],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    op, _, x = gpu
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv(autotune.CACHE_VARIABLE, str(tmp_path / "file" / "cache.json"))
    for name in ("op", "other", "op"):
        assert autotune.run(name, op, [x]) == (32, 128)
    assert len(op.timed) == 6  # in memory they are kept
    assert len([r for r in caplog.records if "cannot be written" in r.message]) == 1
    assert (tmp_path / "file").read_text() == "in the way"


def test_the_file_lies_in_the_users_cache_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(autotune.CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert autotune.cache_file() == tmp_path / "mobilesteelnet" / "triton_autotune.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert autotune.cache_file().relative_to(tmp_path).parts[0] == ".cache"


def test_a_cpu_is_not_tuned() -> None:
    op = Op(TIMES)
    assert autotune.run("op", op, [X]) == (128, 128)
    assert op.timed == []
    assert not autotune.cache_file().exists()


@pytest.mark.parametrize(
    ("switch", "expected"), [("1", "tuned msff"), ("0", "plain"), ("", "plain")]
)
def test_the_switch_is_read_at_import_and_costs_nothing_when_off(
    switch: str, expected: str
) -> None:
    code = """
import sys, types
from fused.backends import triton
fake = types.ModuleType("autotune")
fake.run = lambda op, call, args: f"tuned {op}"
stage = types.ModuleType("msff")
stage.forward = lambda *args: "plain"
for module in (fake, stage):
    setattr(triton, module.__name__, module)
    sys.modules[f"fused.backends.triton.{module.__name__}"] = module
print(triton.KERNELS["msff"](1, 2))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FUSED_TRITON_AUTOTUNE": switch}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == expected, done.stderr
