"""torch.func's transforms of the layers, for which errors send users to the reference backend."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from frozen_cases import calibrated
from stage_cases import error
from torch import nn
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, stack_module_state, vmap

from fused import FusedCIEMA, FusedMSFF
from fused.backends.reference.published import PublishedCIEMA, PublishedMSFF

Call = Callable[[nn.Module, torch.Tensor], torch.Tensor]


def _of_samples(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Gradients of every sample for the parameters, in one row each."""
    buffers = dict(model.named_buffers())

    def loss(parameters: dict[str, torch.Tensor], sample: torch.Tensor) -> torch.Tensor:
        return functional_call(model, (parameters, buffers), (sample[None],)).square().sum()

    parameters = {key: value.detach() for key, value in model.named_parameters()}
    found = vmap(grad(loss), (None, 0))(parameters, x)
    return torch.cat([value.flatten(1) for value in found.values()], 1)


CALLS: dict[str, Call] = {
    "vmap": lambda model, x: vmap(model)(torch.stack([x, 2 * x])),
    "jacfwd": lambda model, x: jacfwd(lambda v: model(v).sum((1, 2, 3)))(x),
    "jacrev": lambda model, x: jacrev(lambda v: model(v).sum((1, 2, 3)))(x),
    "per-sample gradients": _of_samples,
}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_the_reference_is_transformed_as_the_published_block(
    name: str, memory_format: torch.memory_format
) -> None:
    published = calibrated(PublishedCIEMA(16, 4)).double()
    block = FusedCIEMA(16, 4, backend="reference").double().eval()
    block.load_state_dict(published.state_dict())
    x = torch.randn(2, 16, 4, 3, dtype=torch.float64).contiguous(memory_format=memory_format)
    got, want = CALLS[name](block, x), CALLS[name](published, x)
    assert want.abs().max() > 1e-3
    assert error(got, want) < 1e-9


def test_fusion_is_mapped_over_batches() -> None:
    published = calibrated(PublishedMSFF([4, 8])).double()
    block = FusedMSFF([4, 8], backend="reference").double().eval()
    block.load_state_dict(published.state_dict())
    maps = torch.randn(3, 2, 4, 6, 6).double(), torch.randn(3, 2, 8, 3, 3).double()
    got, want = (vmap(lambda a, b, m=m: m([a, b]))(*maps) for m in (block, published))
    assert error(got, want) < 1e-9


@pytest.mark.parametrize("training", [True, False])
def test_stacked_models_are_sent_to_the_reference_by_name(training: bool) -> None:
    """The weights ask for gradients under vmap's tensors, which do not say so."""
    models = [FusedCIEMA(16, 4).train(training) for _ in range(2)]
    state, x = stack_module_state(models), torch.randn(2, 16, 4, 3)

    def call(parameters: dict[str, torch.Tensor], buffers: dict[str, torch.Tensor]) -> torch.Tensor:
        out: torch.Tensor = functional_call(models[0], (parameters, buffers), (x,))
        return out

    with pytest.raises(RuntimeError, match=r"by torch\.func; backend='reference' can"):
        vmap(call)(*state)
    models = [FusedCIEMA(16, 4, backend="reference").eval() for _ in range(2)]
    got = vmap(call)(*stack_module_state(models))
    torch.testing.assert_close(got, torch.stack([m(x) for m in models]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_forward_mode_is_refused_in_a_compiled_call_too(backend: str) -> None:
    """Not answered with zeros: in evaluation no node of autograd would see the tangent."""
    block, x = FusedCIEMA(16, 4).eval(), torch.randn(2, 16, 4, 3)
    msff, maps = FusedMSFF([4, 8]).eval(), (torch.randn(2, 4, 4, 4), torch.randn(2, 8, 2, 2))
    calls = {
        "channel_interaction": lambda: jvp(block, (x,), (x,)),
        "msff": lambda: jvp(lambda *m: msff(m), maps, maps),
    }
    for name, call in calls.items():
        for parameter in (*block.parameters(), *msff.parameters()):
            parameter.requires_grad = False
        with pytest.raises(Exception, match=rf"ciema::{name} cannot be differentiated in forward"):
            torch.compile(call, backend=backend)()
