"""The registry: precedence, refusals with reasons, no silent fallback, explain()."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch import nn

import fused
from fused import BackendError, FusedCIEMA, backends
from fused.backends import BACKENDS, Backend, choose, cpu, cuda, requested, triton


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )


def test_precedence_call_module_default_auto() -> None:
    assert requested(None) == "auto"
    fused.set_backend("reference")
    assert requested(None) == "reference"
    assert requested("cpu") == "cpu"
    fused.set_backend(None)
    assert requested(None) == "auto"


def test_environment_is_read_once_at_import() -> None:
    code = (
        "import os, fused; from fused.backends import requested;"
        "os.environ['FUSED_BACKEND'] = 'cpu'; print(requested(None));"
        "fused.set_backend('cpu'); print(requested(None))"
    )
    result = run_python(code, FUSED_BACKEND="reference")
    assert result.stdout.split() == ["reference", "cpu"], result.stderr


def test_an_unknown_environment_value_is_refused_where_it_counts() -> None:
    code = (
        "import fused, torch; layer = fused.FusedCIEMA(4, 2, backend='reference');"
        "x = torch.ones(1, 4, 2, 2); layer(x); layer.backend = None\n"
        "for call in (lambda: layer(x), lambda: fused.explain(layer), lambda: fused.explain(x)):\n"
        "    try: call()\n"
        "    except fused.BackendError as error: print(error)\n"
        "fused.set_backend(None); layer(x); print('runs')"
    )
    result = run_python(code, FUSED_BACKEND="abacus")
    *refusals, end = result.stdout.splitlines()
    assert end == "runs", result.stderr
    assert len(refusals) == 3
    assert all(text.startswith("FUSED_BACKEND='abacus' is unknown, known") for text in refusals)


def test_unknown_names_are_refused() -> None:
    for action in (
        lambda: fused.set_backend("abacus"),
        lambda: FusedCIEMA(16, 4, backend="abacus"),
        lambda: choose("msff", torch.zeros(1, 4, 2, 2), "abacus"),
    ):
        with pytest.raises(BackendError, match=r"'abacus' is unknown, known are"):
            action()


def test_an_explicit_backend_that_cannot_run_raises_its_reason() -> None:
    x = torch.zeros(1, 16, 4, 4)
    with pytest.raises(BackendError, match="backend='cuda' cannot run channel_interaction: "):
        FusedCIEMA(16, 4, backend="cuda").eval()(x)
    fused.set_backend("cuda")
    with pytest.raises(BackendError, match="backend='cuda'"):
        FusedCIEMA(16, 4).eval()(x)
    fused.set_backend(None)
    # A module's own choice comes before the default.
    fused.set_backend("cuda")
    assert FusedCIEMA(16, 4, backend="reference").eval()(x).isfinite().all()


@pytest.mark.parametrize(
    ("code", "allowed"),
    [
        ("pass", False),
        ("torch.backends.cuda.matmul.allow_tf32 = True", True),
        ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", True),
        ("torch.backends.fp32_precision = 'tf32'", True),
        ("torch.set_float32_matmul_precision('high')", True),
        (
            "torch.set_float32_matmul_precision('high')\n"
            "torch.backends.cuda.matmul.fp32_precision = 'ieee'",
            False,
        ),
    ],
)
def test_every_switch_of_tf32_is_followed(code: str, allowed: bool) -> None:
    """In a process of its own: once one was set, others may not be read any more."""
    told = f"import torch\nfrom fused.backends.maps import allows_tf32\n{code}\n"
    done = run_python(told + "print(allows_tf32())")
    assert done.stdout.strip() == str(allowed), done.stderr


@pytest.mark.parametrize(
    ("op", "name", "shape", "reason"),
    [
        ("channel_interaction", "cuda", (65536, 4, 1, 1), "a batch of 65536 is over 65535"),
        ("coordinate_attention", "triton", (1, 4, 4096, 4096), "H.W = 16777216 is over 16777215"),
        ("cross_spatial", "triton", (1, 4, 3000, 3000), "H.W = 9000000 is over 8388480"),
        ("cross_spatial_backward", "triton", (1, 4, 1500, 1400), "H.W = 2100000 is over 2097120"),
    ],
)
def test_what_a_gpu_cannot_launch_is_a_reason(
    op: str, name: str, shape: tuple[int, ...], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "emulated", True)
    monkeypatch.setattr(triton, "INTERPRETER", True)
    x = torch.zeros(1).expand(shape)
    told = BACKENDS[name].why_not(op, x)
    assert told is not None
    assert re.fullmatch(reason, told)
    assert BACKENDS[name].why_not(op, x[:100, :, :100]) is None


def test_a_group_that_cuda_cannot_count_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "emulated", True)
    x = torch.zeros(1).expand(1, 64, 5793, 5793)
    told = BACKENDS["cuda"].why_not("coordinate_attention", x, 1)
    assert told == "a group of 2147766336 values is over 2147483647"
    assert BACKENDS["cuda"].why_not("coordinate_attention", x, 2) is None
    assert BACKENDS["cuda"].why_not("coordinate_attention", x[..., :-1], 1) is None


@pytest.mark.skipif(cpu.LIBRARY.error is not None, reason="no native CPU code")
def test_auto_leaves_one_hidden_channel_in_half_precision_to_the_library() -> None:
    for channels, dtype, name in (
        *((4, torch.bfloat16, "reference"), (7, torch.float16, "reference")),
        *((8, torch.bfloat16, "cpu"), (4, torch.float32, "cpu")),
    ):
        x = torch.zeros(1, channels, 2, 2, dtype=dtype)
        assert choose("gated_fusion", x).name == name
        assert choose("gated_fusion", x, "cpu").name == "cpu"


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed")
def test_the_interpreter_is_what_the_switch_gives() -> None:
    program = (
        "import os; os.environ.pop('TRITON_INTERPRET', None)\n"
        "import fused.backends.triton as t, triton; print(t.INTERPRETER)"
    )
    done = run_python(program, FUSED_TRITON_INTERPRETER="1")
    assert done.stdout.strip() == "True", done.stderr


def test_auto_takes_the_next_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lame = Backend("lame", {}, lambda op, x: "it limps")
    monkeypatch.setattr(backends, "BACKENDS", {"lame": lame, **BACKENDS})
    x = torch.zeros(1, 4, 2, 2)
    with caplog.at_level(logging.INFO, logger="fused"):
        assert choose("msff", x).name != "lame"
        choose("msff", x)
    assert [r.message for r in caplog.records if "lame" in r.message] == [
        "auto: lame does not run msff: it limps"
    ]


def test_the_choice_of_the_forward_holds_for_the_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    kernels = {
        name: (lambda *a, _n=name, _k=kernel: calls.append(_n) or _k(*a))
        for name, kernel in BACKENDS["reference"].kernels.items()
    }
    spy = Backend("spy", kernels, lambda op, x: None)
    monkeypatch.setattr(backends, "BACKENDS", {**BACKENDS, "spy": spy})
    block = FusedCIEMA(16, 4, backend="spy")
    out = block(torch.randn(2, 16, 4, 4))
    fused.set_backend("reference")
    block.backend = None
    out.sum().backward()
    stages = ["gated_fusion", "cross_spatial", "coordinate_attention", "channel_interaction"]
    assert calls == [*reversed(stages), *(f"{s}_backward" for s in stages)]


def test_explain_of_a_tensor_and_of_modules() -> None:
    table = fused.explain(torch.zeros(1, 32, 4, 4))
    assert set(table.chosen()) == {("", stage) for stage in fused.contract.STAGES}
    assert all(line.reason for line in table.lines)
    cuda = [line for line in table.lines if line.backend == "cuda"]
    assert cuda
    assert not any(line.runs for line in cuda) or torch.cuda.is_available()

    model = nn.Sequential(nn.ReLU(), FusedCIEMA(16, 4, backend="reference"))
    assert set(fused.explain(model).chosen().values()) == {"reference"}
    assert "1.cross_spatial" in str(fused.explain(model))
    with pytest.raises(ValueError, match="holds no FusedCIEMA"):
        fused.explain(nn.ReLU())
    with pytest.raises(TypeError, match="got int"):
        fused.explain(3)


@pytest.mark.parametrize("name", ["cpu", "reference", None])
def test_explain_of_called_children_and_an_explicit_backend(name: str | None) -> None:
    block, x = FusedCIEMA(16, 4, backend=name).eval(), torch.zeros(1, 16, 4, 4)
    block.conv3x3.register_forward_hook(lambda *_: None)
    for default in (None, "cpu"):
        fused.set_backend(default)
        lines = fused.explain(block).lines
        assert len(lines) == 4
        if (name or default) == "cpu":
            with pytest.raises(BackendError) as raised:
                block(x)
            assert {(line.backend, line.runs, line.chosen) for line in lines} == {
                ("cpu", False, False)
            }
            assert {line.reason for line in lines} == {str(raised.value)}
        else:
            block(x)
            assert set(fused.explain(block).chosen().values()) == {"reference"}


def test_explain_tells_what_really_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: dict[str, str] = {}

    def spied(backend: Backend) -> Backend:
        def spy(name: str, kernel):
            def run(*args):
                ran[name] = backend.name
                return kernel(*args)

            return run

        kernels = {name: spy(name, kernel) for name, kernel in backend.kernels.items()}
        return Backend(backend.name, kernels, backend.can_run)

    monkeypatch.setattr(backends, "BACKENDS", {n: spied(b) for n, b in BACKENDS.items()})
    block = FusedCIEMA(16, 4).eval()
    block(torch.randn(1, 16, 4, 4))
    said = {stage: name for (_, stage), name in fused.explain(block).chosen().items()}
    assert said == ran


def test_a_plain_tensor_in_a_parameters_place_is_explained_and_frozen() -> None:
    """As meta-learning sets it: the weight of a step is a tensor, not a Parameter."""
    block, x = FusedCIEMA(16, groups=4).eval(), torch.randn(1, 16, 5, 6)
    expected = block(x)
    weight = block.final_fusion[0].weight.detach()
    del block.final_fusion[0].weight
    block.final_fusion[0].weight = weight
    assert fused.explain(block).chosen()[("", "gated_fusion")] == "cpu"
    frozen = fused.optimize_for_inference(block)
    torch.testing.assert_close(frozen(x), expected, rtol=1e-5, atol=1e-5)
