"""MSFF on Triton where positions and offsets pass 32 bits."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
from stage_cases import OPS, convert, differentiable, error, require_grad

from benchmarks import triton_capture
from benchmarks.triton_compile import TARGETS
from fused.backends.triton import INTERPRETER, KERNELS, can_run
from fused.backends.triton.launch import intercept
from fused.contract import EPS


@pytest.mark.skipif(not INTERPRETER, reason="FUSED_TRITON_INTERPRETER is not 1")
def test_a_strip_of_a_line_scan_camera() -> None:
    # Twice the product of the widths is over 2³¹.
    features = [torch.randn(1, 2, 1, width) for width in (40000, 27000)]
    assert can_run("msff", features[0]) is None
    named = {
        "features": features,
        "weight": torch.randn(3, 4, 1, 1),
        **{"bn_weight": torch.ones(3), "bn_bias": torch.zeros(3)},
        **{"running_mean": torch.zeros(3), "running_var": torch.ones(3)},
        **{"training": False, "eps": EPS},
    }
    grad = torch.randn(1, 3, *features[0].shape[2:])

    def run(dtype: torch.dtype, backend: str) -> list[torch.Tensor]:
        args = convert("msff", named, dtype, "contiguous")
        leaves = require_grad("msff", args)
        outputs = OPS["msff"](*args, backend=backend)
        wanted = differentiable("msff", outputs)
        return [*wanted, *torch.autograd.grad(wanted, leaves, [grad.to(dtype)])]

    for got, want in zip(
        run(torch.float32, "triton"), run(torch.float64, "reference"), strict=True
    ):
        assert error(got, want) <= 1e-4


@pytest.mark.skipif(INTERPRETER, reason="launches are captured for a GPU")
def test_an_expanded_gradient_hides_no_large_map() -> None:
    captured: list = []
    target = TARGETS["sm_90"]
    with (
        triton_capture.FAKE,
        triton_capture.device(target),
        intercept(captured.append),
        torch.no_grad(),
    ):
        half = {"device": "cuda", "dtype": torch.float16}
        features = [torch.empty(1, 8, 1456, 1456, **half)]
        weight = torch.empty(1024, 8, 1, 1, device="cuda")
        vector = torch.empty(1024, device="cuda")
        grad = torch.empty((), **half).expand(1, 1024, 1456, 1456)  # of out.sum()
        KERNELS["msff_backward"](
            *(grad, features, vector, vector, weight, vector, vector, None, None, True, 1e-5)
        )
    large = {}
    for launch in captured:
        tensors = (a for a in launch.named_args().values() if isinstance(a, torch.Tensor))
        if "WIDE" in launch.constexprs and any(t.numel() > 2**31 for t in tensors):
            large[launch.name] = launch.constexprs["WIDE"]
    assert "msff_backward_kernel" in large
    assert all(large.values()), large
