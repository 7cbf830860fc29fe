"""A row's inputs, its module as a provider builds it, and the float64 results that judge it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fused.contract import TOLERANCES

from .gpu_rows import FORWARD, SCALES, TRAINING, Row
from .measure import GateError, Results
from .providers import Provider, Runnable
from .stages import BOTH, Case, Shape
from .stages import FORWARD as EVALUATION

DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
# The contract's tolerances; tf32 keeps as many bits as float16.
LIMITS = {name: TOLERANCES[dtype] for name, dtype in DTYPES.items()}
LIMITS["tf32"] = TOLERANCES[torch.float16]
# Alternatives only have to compute the same function: no claim is made about their accuracy.
ALTERNATIVE_SLACK, LARGEST_LIMIT = 10.0, 0.3
# Samples of a float64 evaluation at a time.
CHUNK = 8


def cases_mode(mode: str) -> str:
    """The mode in the words of `stages.py`."""
    return EVALUATION if mode == FORWARD else BOTH


def case_for(row: Row, scale: str, device: str) -> Case:
    """The subject with calibrated weights and its inputs, float32 on the device."""
    width, size = SCALES[scale]
    case = Case(row.subject, Shape(f"{scale}-batch{row.batch}", row.batch, width, size))
    with torch.device(device):
        case.inputs  # noqa: B018  drawn here, where tensors are made on the device
    return case


@contextlib.contextmanager
def products_in(precision: str) -> Iterator[None]:
    """float32 products as the precision says: exact for "fp32", rounded for "tf32"."""
    flags: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [flag.allow_tf32 for flag in flags]
    for flag in flags:
        flag.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.allow_tf32 = value


@dataclass
class Trial:
    """One provider on one row, ready to be called.

    Attributes:
        row: what it is.
        device: "cuda" or "cpu".
        runnable: the provider's; its module is in the row's dtype and layout.
        inputs: in the row's dtype and layout; leaves in training.
        exact: no autocast, whatever the row's precision: for the float64 form.
        grads: gradients of the outputs that a training call starts from, drawn by the first one.
    """

    row: Row
    device: str
    runnable: Runnable
    inputs: list[torch.Tensor]
    exact: bool = False
    grads: list[torch.Tensor] = dataclasses.field(default_factory=list)

    @functools.cached_property
    def leaves(self) -> dict[str, torch.Tensor]:
        """Inputs and parameters by name."""
        assert self.runnable.module is not None
        named = {f"input_{index}": x for index, x in enumerate(self.inputs)}
        return named | dict(self.runnable.module.named_parameters())

    def _forward(self) -> tuple[torch.Tensor, ...]:
        dtype = DTYPES[self.row.precision]
        half = self.row.mode == TRAINING and dtype != torch.float32 and not self.exact
        with torch.autocast(self.device, dtype if half else None, enabled=half):
            return self.runnable.run(*self.inputs)

    def results(self) -> Results:
        """One call: outputs, and in training gradients by name."""
        if self.row.mode == FORWARD:
            with torch.no_grad():
                return Results(self._forward(), {})
        outputs = self._forward()
        self.grads = self.grads or output_gradients(outputs, self.row.precision)
        found = torch.autograd.grad(
            outputs, list(self.leaves.values()), self.grads, allow_unused=True
        )
        pairs = zip(self.leaves, found, strict=True)
        gradients = {name: grad for name, grad in pairs if grad is not None}
        return Results(tuple(o.detach() for o in outputs), gradients)

    def call(self) -> list[torch.Tensor]:
        """What is timed: `results`, without the names."""
        results = self.results()
        return [*results.outputs, *results.gradients.values()]


def output_gradients(outputs: tuple[torch.Tensor, ...], precision: str) -> list[torch.Tensor]:
    """Random gradients, the same for every provider: values that the row's dtype can hold."""
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    out = []
    for output in outputs:
        grad = torch.randn(output.shape, generator=generator, device=output.device)
        out.append(grad.to(DTYPES[precision]).to(output.dtype))
    return out


def _laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    if x.dim() == 4 and layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    return x.contiguous()


def _stored(row: Row) -> torch.dtype:
    """Dtype of maps and parameters: autocast keeps float32 and rounds by itself."""
    return torch.float32 if row.mode == TRAINING else DTYPES[row.precision]


def _rounded(row: Row, x: torch.Tensor) -> torch.Tensor:
    """A map with values that the row's dtype holds: their rounding is nobody's error."""
    return x.to(DTYPES[row.precision]).to(x.dtype) if x.dim() == 4 else x


def trial_of(row: Row, case: Case, provider: Provider, device: str) -> Trial:
    """Build the provider's module in the row's dtype and layout, and the inputs."""
    dtype = _stored(row)
    with torch.device(device):
        runnable = provider.build(case, cases_mode(row.mode), 1)
    assert runnable.module is not None
    runnable.module.to(dtype)
    if row.layout == "channels_last":
        runnable.module.to(memory_format=torch.channels_last)

    def one(x: torch.Tensor) -> torch.Tensor:
        # Gates and statistics between stages are float32, but the published layers mix no dtypes.
        to = dtype if x.dim() == 4 or provider.published else torch.float32
        x = _rounded(row, x).to(to)
        return _laid_out(x.detach(), row.layout).requires_grad_(row.mode == TRAINING)

    return Trial(row, device, runnable, [one(x) for x in case.inputs])


# -------------------------------------------------------------------------------------------- gate


def oracle(row: Row, case: Case, device: str) -> Results:
    """The published form in float64, on the row's inputs and on weights as the row stores them."""
    dtype = _stored(row)
    inputs = [_rounded(row, x).double() for x in case.inputs]

    def judge(form: str, backend: str, inputs: list[torch.Tensor]) -> Results:
        with torch.device(device):
            module = case.module(form, backend)
        module = module.train(row.mode == TRAINING).to(dtype).double()
        leaves = [x.detach().requires_grad_(row.mode == TRAINING) for x in inputs]
        return Trial(row, device, Runnable(module, module), leaves, exact=True).results()

    if row.mode == FORWARD:
        parts = [
            judge("published", "reference", [x[start : start + CHUNK] for x in inputs])
            for start in range(0, row.batch, CHUNK)
        ]
        columns = zip(*(part.outputs for part in parts), strict=True)
        return Results(tuple(torch.cat(column) for column in columns), {})
    try:
        return judge("published", "reference", inputs)
    except torch.OutOfMemoryError:
        # The ops take float64 in the reference's kernels, and keep a tenth of the memory.
        return judge("fused", "auto", inputs)


def errors(got: Results, want: Results, pixels: int) -> dict[str, float]:
    """Relative error of every output and gradient: ‖got − want‖ / ‖want‖.

    Where a gradient all but vanishes it is held against 0.1 an element; that of a parameter, a sum
    over `pixels` random terms, against a hundredth of the sum's spread.

    Raises:
        GateError: something is missing or has another shape.
    """
    if len(got.outputs) != len(want.outputs):
        raise GateError(f"{len(got.outputs)} outputs, expected {len(want.outputs)}")
    missing = sorted(want.gradients.keys() - got.gradients.keys())
    if missing:
        raise GateError(f"no gradient for {', '.join(missing)}")
    pairs = {
        f"output {index}": pair
        for index, pair in enumerate(zip(got.outputs, want.outputs, strict=True))
    }
    pairs |= {
        f"gradient of {name}": (got.gradients[name], value)
        for name, value in want.gradients.items()
    }
    found = {}
    for what, (value, expected) in pairs.items():
        if value.shape != expected.shape:
            raise GateError(f"{what} has shape {tuple(value.shape)}, not {tuple(expected.shape)}")
        vanishing = 0.1
        if what.startswith("gradient") and "input_" not in what:
            vanishing = max(vanishing, 0.01 * pixels**0.5)
        floor = max(expected.norm().item(), vanishing * expected.numel() ** 0.5)
        found[what] = (value.double() - expected).norm().item() / floor
    return found


def limit_of(row: Row, what: str) -> float:
    """The largest error that passes."""
    output, gradient = LIMITS[row.precision]
    limit = gradient if what.startswith("gradient") else output
    return limit if row.is_ours else min(ALTERNATIVE_SLACK * limit, LARGEST_LIMIT)
