"""Who is timed: the alternatives, and every backend of ours. A provider is a name and a builder."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import fused
from fused.backends import BACKENDS

from .memory import peak_of
from .stages import BACKWARD, FORWARD, Case

Run = Callable[..., tuple[torch.Tensor, ...]]


@dataclass
class Runnable:
    """A provider ready to run one case.

    Attributes:
        run: inputs → outputs.
        module: whose parameters take part; None for a runtime, which cannot train.
        peak_bytes: for a runtime, resident memory from before it loaded the graph to the peak of
            its first call; it keeps its memory, so later calls would show nothing.
    """

    run: Run
    module: nn.Module | None = None
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Provider:
    """One column of the tables.

    Attributes:
        name: as in the tables and for `-k`.
        published: whether it computes the published form; decides which FLOP count it is held to.
        build: (case, mode, threads) → Runnable.
        why_not: (case, mode) → None, or why it cannot run there.
        dtype: of the maps inside; inputs and outputs are float32. Decides on the gate's tolerance
            and on which alternatives it is compared with.
    """

    name: str
    published: bool
    build: Callable[[Case, str, int], Runnable]
    why_not: Callable[[Case, str], str | None] = lambda case, mode: None
    dtype: torch.dtype = torch.float32

    @property
    def is_fused(self) -> bool:
        """Ours; all others are alternatives."""
        return self.name.startswith("fused-")


def _eager(form: str, backend: str) -> Callable[[Case, str, int], Runnable]:
    def build(case: Case, mode: str, threads: int) -> Runnable:
        module = case.module(form, backend).train(mode != FORWARD)
        return Runnable(module, module)

    return build


def _compiled(form: str) -> Callable[[Case, str, int], Runnable]:
    def build(case: Case, mode: str, threads: int) -> Runnable:
        # Without a reset the compiler would count shapes and fall back to eager after a few.
        torch._dynamo.reset()
        module = case.module(form).train(mode != FORWARD)
        return Runnable(torch.compile(module, fullgraph=True, dynamic=False), module)

    return build


# ---------------------------------------------------------------------------------------- runtimes


def _runtime_why_not(package: str) -> Callable[[Case, str], str | None]:
    def why_not(case: Case, mode: str) -> str | None:
        if mode != FORWARD:
            return f"{package} does not train"
        for name in ("onnx", "onnxscript", package):
            if importlib.util.find_spec(name) is None:
                return f'{name} is not installed: pip install "mobilesteelnet[bench]"'
        return None

    return why_not


@functools.lru_cache(maxsize=1)
def _onnx_bytes(case: Case) -> bytes:
    """The published form of the case as ONNX, at fixed sizes, which runtimes can plan best."""
    module, inputs = case.module("published").eval(), tuple(case.inputs)
    names = [f"input_{i}" for i in range(len(inputs))]
    with torch.no_grad():
        program = torch.onnx.export(module, inputs, input_names=names, dynamo=True, verbose=False)
    assert program is not None
    content: bytes = program.model_proto.SerializeToString()
    return content


def _onnxruntime(case: Case, mode: str, threads: int) -> Runnable:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    content = _onnx_bytes(case)

    def load() -> Run:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        names = [i.name for i in session.get_inputs()]

        def run(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            feed = {n: x.numpy() for n, x in zip(names, inputs, strict=True)}
            return tuple(torch.from_numpy(out) for out in session.run(None, feed))

        return run

    return _load(load, case)


def _openvino(precision: str) -> Callable[[Case, str, int], Runnable]:
    def build(case: Case, mode: str, threads: int) -> Runnable:
        import openvino

        properties = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}
        content = _onnx_bytes(case)

        def load() -> Run:
            core = openvino.Core()
            compiled = core.compile_model(core.read_model(content), "CPU", properties)
            request = compiled.create_infer_request()

            def run(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
                results = request.infer([x.numpy() for x in inputs], share_inputs=True)
                return tuple(torch.from_numpy(out) for out in results.values())

            return run

        return _load(load, case)

    return build


def _openvino_bf16_why_not(case: Case, mode: str) -> str | None:
    reason = _runtime_why_not("openvino")(case, mode)
    if reason is not None:
        return reason
    import openvino

    able = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return None if "BF16" in able else f"openvino does not compute in bfloat16 here, only {able}"


def _load(load: Callable[[], Run], case: Case) -> Runnable:
    runs: list[Run] = []
    peak = peak_of(lambda: runs[0](*case.inputs), before=lambda: runs.append(load()))
    return Runnable(runs[0], peak_bytes=peak)


# ------------------------------------------------------------------------------------------ frozen


def _frozen(dtype: torch.dtype) -> Callable[[Case, str, int], Runnable]:
    def build(case: Case, mode: str, threads: int) -> Runnable:
        module = case.frozen(dtype)
        return Runnable(module, module)

    return build


def _frozen_why_not(case: Case, mode: str) -> str | None:
    if mode != FORWARD:
        return "the frozen form does not train"
    return _backend_why_not("cpu")(case, mode)


# ---------------------------------------------------------------------------------------- backends


def _backend_why_not(name: str) -> Callable[[Case, str], str | None]:
    def why_not(case: Case, mode: str) -> str | None:
        x = max(case.inputs, key=torch.Tensor.numel)
        for stage in case.stages:
            for op in (stage,) if mode == FORWARD else (stage, f"{stage}_backward"):
                reason = BACKENDS[name].why_not(op, x)
                if reason is not None:
                    return reason
        return None

    return why_not


def chosen_backends(case: Case, mode: str) -> dict[str, str]:
    """Which backend "auto" takes for each op of the case."""
    x = max(case.inputs, key=torch.Tensor.numel)
    suffixes = {FORWARD: ("",), BACKWARD: ("_backward",)}.get(mode, ("", "_backward"))
    ops = [stage + suffix for stage in case.stages for suffix in suffixes]
    return {op: fused.backends.choose(op, x).name for op in ops}


PUBLISHED = Provider("published", True, _eager("published", "reference"))
PROVIDERS: list[Provider] = [
    PUBLISHED,
    Provider("reference", False, _eager("fused", "reference")),
    Provider("compiled", False, _compiled("fused")),
    Provider("compiled-published", True, _compiled("published")),
    Provider("onnxruntime", True, _onnxruntime, _runtime_why_not("onnxruntime")),
    Provider("openvino", True, _openvino("f32"), _runtime_why_not("openvino")),
    Provider(
        *("openvino-bf16", True, _openvino("bf16"), _openvino_bf16_why_not),
        dtype=torch.bfloat16,
    ),
    Provider("fused-auto", False, _eager("fused", "auto")),
    *(
        Provider(f"fused-{name}", False, _eager("fused", name), _backend_why_not(name))
        for name in BACKENDS
        if name != "reference"
    ),
    Provider("fused-frozen", False, _frozen(torch.float32), _frozen_why_not),
    Provider(
        *("fused-frozen-bf16", False, _frozen(torch.bfloat16), _frozen_why_not),
        dtype=torch.bfloat16,
    ),
]
# Its graph holds the 2G calls one by one: quicker than the batched one, minutes to compile.
SLOW_PROVIDERS = frozenset({"compiled-published"})
