"""One benchmark: the correctness gate, memory, then the clock."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fused.contract import TOLERANCES

from .memory import peak_of, saved_bytes
from .peak import peak_gflop_per_second
from .providers import Provider, Runnable, chosen_backends
from .stages import BACKWARD, FORWARD, SHAPES, Case

MIN_ROUNDS, MAX_ROUNDS = 3, 50
# Of N arguments of a ReLU about 1e-7·N lie so near zero that float32 rounds them to its other side,
# eager PyTorch as well; each moves the gradients by some 1/√N, together by about this.
KINKS = 2e-3


class GateError(AssertionError):
    """A provider's results are wrong, so it is not timed."""


@dataclass(frozen=True)
class Results:
    """Outputs and, after a training step, gradients by name: input_0, … and parameters' keys."""

    outputs: tuple[torch.Tensor, ...]
    gradients: dict[str, torch.Tensor]


@functools.lru_cache(maxsize=1)
def case_of(subject: str, shape: str) -> Case:
    """The case, kept until the next one is asked for."""
    return Case(subject, SHAPES[shape])


# -------------------------------------------------------------------------------------------- gate


def _leaves(case: Case, dtype: torch.dtype, training: bool) -> list[torch.Tensor]:
    return [x.detach().to(dtype).requires_grad_(training) for x in case.inputs]


def _grad_outputs(outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]


def results_of(runnable: Runnable, case: Case, training: bool, dtype: torch.dtype) -> Results:
    """Outputs, and in training the gradients of inputs and parameters."""
    inputs = _leaves(case, dtype, training)
    if not training:
        with torch.no_grad():
            return Results(runnable.run(*inputs), {})
    assert runnable.module is not None
    runnable.module.zero_grad(set_to_none=True)
    outputs = runnable.run(*inputs)
    torch.autograd.backward(outputs, _grad_outputs(outputs))
    gradients = {f"input_{i}": x.grad for i, x in enumerate(inputs)}
    gradients |= {name: p.grad for name, p in runnable.module.named_parameters()}
    found = {name: g for name, g in gradients.items() if g is not None}
    return Results(tuple(o.detach() for o in outputs), found)


@functools.lru_cache(maxsize=1)
def oracle(case: Case, training: bool) -> Results:
    """The published form in float64."""
    module = case.module("published").double().train(training)
    return results_of(Runnable(module, module), case, training, torch.float64)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """‖got − want‖ / ‖want‖; where want all but vanishes, against 0.1 an element (as tests do)."""
    if got.shape != want.shape:
        raise GateError(f"shape {tuple(got.shape)}, expected {tuple(want.shape)}")
    floor = max(want.norm().item(), 0.1 * want.numel() ** 0.5)
    return (got.double() - want).norm().item() / floor


def gate(name: str, got: Results, want: Results, dtype: torch.dtype = torch.float32) -> float:
    """Compare with the oracle.

    Returns:
        The largest relative error of outputs and gradients.

    Raises:
        GateError: something is missing, or beyond `fused.contract.TOLERANCES` and `KINKS`.
    """
    output_tolerance, gradient_tolerance = TOLERANCES[dtype]
    gradient_tolerance = max(gradient_tolerance, KINKS)
    if len(got.outputs) != len(want.outputs):
        raise GateError(f"{name}: {len(got.outputs)} outputs, expected {len(want.outputs)}")
    missing = sorted(want.gradients.keys() - got.gradients.keys())
    if missing:
        raise GateError(f"{name}: no gradient for {missing}; not timed")
    pairs = [
        (f"output {i}", *both, output_tolerance)
        for i, both in enumerate(zip(got.outputs, want.outputs, strict=True))
    ]
    pairs += [
        (f"gradient of {key}", got.gradients[key], value, gradient_tolerance)
        for key, value in want.gradients.items()
    ]
    worst = 0.0
    for what, value, expected, tolerance in pairs:
        error = relative_error(value, expected)
        if not error <= tolerance:  # NaN too
            raise GateError(
                f"{name}: {what} has relative error {error:.1e}, tolerance {tolerance:.0e}; "
                "not timed"
            )
        worst = max(worst, error)
    return worst


# ------------------------------------------------------------------------------------------- clock


@functools.lru_cache(maxsize=1)
def _built(provider: Provider, case: Case, training: bool, threads: int) -> Runnable:
    """Kept for the next mode of the same provider: compiling costs more than timing."""
    return provider.build(case, BACKWARD if training else FORWARD, threads)


@functools.lru_cache(maxsize=1)
def _passed(provider: Provider, case: Case, training: bool, threads: int) -> float:
    """The gate's largest error; as `_built`, once for both training modes."""
    runnable = _built(provider, case, training, threads)
    got = results_of(runnable, case, training, torch.float32)
    return gate(provider.name, got, oracle(case, training), provider.dtype)


class Steps:
    """The timed calls of one runnable, and what has to be made ready before each."""

    def __init__(self, runnable: Runnable, case: Case, mode: str) -> None:
        self.runnable, self.mode = runnable, mode
        self.inputs = _leaves(case, torch.float32, mode != FORWARD)
        self.grads: list[torch.Tensor] = []
        if mode != FORWARD:
            self.grads = _grad_outputs([o.detach() for o in self._run()])

    def _run(self) -> tuple[torch.Tensor, ...]:
        return self.runnable.run(*self.inputs)

    def setup(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Drop gradients, and for `backward` run the forward; not timed."""
        if self.mode == FORWARD:
            return (), {}
        assert self.runnable.module is not None
        self.runnable.module.zero_grad(set_to_none=True)
        for x in self.inputs:
            x.grad = None
        return ((self._run(),) if self.mode == BACKWARD else ()), {}

    def call(self, *outputs: tuple[torch.Tensor, ...]) -> object:
        """What is timed."""
        if self.mode == FORWARD:
            with torch.no_grad():
                return self._run()
        torch.autograd.backward(outputs[0] if outputs else self._run(), self.grads)
        return None

    def once(self) -> float:
        """Seconds of one call."""
        args, _ = self.setup()
        start = time.perf_counter()
        self.call(*args)
        return time.perf_counter() - start

    def peak(self) -> int | None:
        """Peak memory of one call in bytes; what a forward left for `backward` is not counted."""
        if self.runnable.peak_bytes is not None:
            return self.runnable.peak_bytes
        args, _ = self.setup()
        return peak_of(lambda: self.call(*args))

    def saved(self) -> int | None:
        """Bytes kept between forward and backward; None for a mode without backward."""
        if self.mode == FORWARD:
            return None
        assert self.runnable.module is not None
        return saved_bytes(self._run, self.runnable.module.parameters())


def run(
    benchmark: Any, case: Case, provider: Provider, mode: str, *, threads: int, seconds: float
) -> None:
    """Gate, measure and time one provider on one case.

    Args:
        benchmark: pytest-benchmark's fixture.
        case: what is run.
        provider: by whom.
        mode: "forward" (evaluation, no gradients), "backward" (of a training forward that is not
            timed) or "both".
        threads: that torch and the runtimes use.
        seconds: to spend on the timed rounds, at least 3 and at most 50 of them.

    Raises:
        GateError: the results are wrong; nothing was timed.
    """
    training = mode != FORWARD
    error = _passed(provider, case, training, threads)
    steps = Steps(_built(provider, case, training, threads), case, mode)
    facts: dict[str, Any] = {
        "subject": case.subject,
        "shape": case.shape.name,
        "size": case.size,
        "mode": mode,
        "provider": provider.name,
        "dtype": str(provider.dtype).removeprefix("torch."),
        "threads": threads,
        "error": error,
        "flop": case.flop(mode, provider.published),
        "peak_gflop_per_second": peak_gflop_per_second(provider.dtype, threads),
        "peak_bytes": steps.peak(),
        "saved_bytes": steps.saved(),
    }
    if provider.name == "fused-auto":
        facts["backends"] = chosen_backends(case, mode)
    rounds = min(max(round(seconds / max(steps.once(), 1e-6)), MIN_ROUNDS), MAX_ROUNDS)
    benchmark.extra_info.update(facts)
    benchmark.pedantic(steps.call, setup=steps.setup, rounds=rounds, iterations=1)
    if benchmark.stats is not None:  # None under --benchmark-disable
        median = benchmark.stats.stats.median
        benchmark.extra_info["gflop_per_second"] = facts["flop"] / median / 1e9
