"""Options, the grid of cases, and the machine's description in the JSON."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from . import machine, table
from .measure import case_of
from .providers import PROVIDERS, SLOW_PROVIDERS, Provider
from .stages import MODES, SHAPES, Case

CHOICES = {
    "tiny": ("tiny",),
    "small": ("small",),
    "paper": ("paper", "paper-batch8"),
    "all": ("small", "paper", "paper-batch4", "paper-batch8"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mobilesteelnet benchmarks")
    group.addoption(
        "--shapes",
        default="paper",
        choices=list(CHOICES),
        help="small: 112x112 pictures and a quarter of the channels; paper (default): 224x224, "
        "batch 1, and batch 8 forward; all: both, and batch 4 training; tiny: a smoke test",
    )
    group.addoption(
        "--threads", type=int, default=torch.get_num_threads(), help="of every provider"
    )
    group.addoption(
        "--seconds", type=float, default=1.0, help="timed seconds a benchmark, 3 to 50 rounds"
    )
    group.addoption(
        "--slow-providers",
        action="store_true",
        help=f"also {', '.join(sorted(SLOW_PROVIDERS))}: minutes of compiling each",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cpu: inference on a CPU by every provider")
    threads = config.getoption("--threads")
    if threads < 1:
        raise pytest.UsageError(f"--threads={threads}, expected at least 1")
    if config.getoption("--seconds") <= 0:
        raise pytest.UsageError(f"--seconds={config.getoption('--seconds')}, expected above 0")
    torch.set_num_threads(threads)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    slow = metafunc.config.getoption("--slow-providers")
    cells = [
        pytest.param(
            *(shape, provider, mode),
            id=f"{shape}-{provider.name}-{mode}",
            # `-k cpu`: inference, which is what all providers of a CPU can do.
            marks=[pytest.mark.cpu] if mode == "forward" else [],
        )
        for shape in CHOICES[metafunc.config.getoption("--shapes")]
        for training in (False, True)
        for provider in PROVIDERS
        if slow or provider.name not in SLOW_PROVIDERS
        for mode in MODES
        if mode in SHAPES[shape].modes and (mode != "forward") == training
    ]
    metafunc.parametrize(("shape", "provider", "mode"), cells)


@pytest.fixture
def case(
    request: pytest.FixtureRequest, shape: str, provider: Provider, mode: str, benchmark: Any
) -> Case:
    """The case of the test file's SUBJECT; skips with the reason where the provider cannot run."""
    found = case_of(request.module.SUBJECT, shape)
    reason = provider.why_not(found, mode)
    if reason is not None:
        pytest.skip(f"{provider.name}: {reason}")
    benchmark.group = f"{found.subject} {found.size} {mode}"
    return found


@pytest.fixture
def settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Keyword arguments of `measure.run`."""
    config = request.config
    return {"threads": config.getoption("--threads"), "seconds": config.getoption("--seconds")}


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The one table of all forwards."""
    session = getattr(config, "_benchmarksession", None)
    found = [
        benchmark.extra_info | {"ms": 1e3 * benchmark.stats.median}
        for benchmark in getattr(session, "benchmarks", ())
        if benchmark.extra_info.get("mode") == "forward" and benchmark.stats.data
    ]
    if found:
        terminalreporter.section("inference on a CPU")
        terminalreporter.write_line(table.FORWARD_TEXT + "\n")
        terminalreporter.write_line(table.inference(found))


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    """What the figures depend on besides the processor, which pytest-benchmark describes itself."""
    machine_info.update(machine.facts(config.getoption("--threads")))
