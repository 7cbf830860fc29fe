"""The network at 64×64 with every fused stage in Triton's interpreter: logits and gradients."""

from __future__ import annotations

import pytest
import torch
from stage_cases import error, tolerance

from fused.backends.triton import INTERPRETER
from mobilesteelnet.model import MobileSteelNet

if not INTERPRETER:
    pytest.skip("FUSED_TRITON_INTERPRETER is not 1", allow_module_level=True)

from fused.backends.triton.launch import Launch, intercept

WIDTH = 1 / 32  # 32 channels in 8 groups: a slab costs the interpreter seconds
NUMBERS = {"num_classes": 6, "width": WIDTH}


def twins() -> tuple[MobileSteelNet, MobileSteelNet]:
    """The network in float32 on Triton, and in float64 on the reference, with equal numbers."""
    torch.manual_seed(5)
    ours = MobileSteelNet(**NUMBERS, backend="triton")
    reference = MobileSteelNet(**NUMBERS, backend="reference").double()
    reference.load_state_dict(ours.state_dict())
    return ours, reference


def test_logits_in_evaluation_and_every_stage_ran() -> None:
    ours, reference = twins()
    images = torch.randn(1, 3, 64, 64)
    names: list[str] = []

    def note(launch: Launch) -> None:
        names.append(launch.name)
        launch.run()

    with torch.no_grad(), intercept(note):
        logits = ours.eval()(images)
    assert error(logits, reference.eval()(images.double())) <= tolerance(torch.float32)[0]
    for stage in ("msff", "channel_interaction", "coordinate_attention", "cross_spatial", "gated"):
        assert any(name.startswith(stage) for name in names), (stage, names)


def test_logits_gradients_and_buffers_in_training() -> None:
    ours, reference = twins()
    images = torch.randn(1, 3, 64, 64)
    labels = torch.tensor([2])
    want = reference.train()(images.double())
    torch.nn.functional.cross_entropy(want, labels).backward()
    # What rounding alone does: batch norm over a few pixels amplifies it, in eager PyTorch alike.
    eager = MobileSteelNet(**NUMBERS, backend="reference")
    eager.load_state_dict(ours.state_dict())
    torch.nn.functional.cross_entropy(eager.train()(images), labels).backward()

    logits = ours.train()(images)
    torch.nn.functional.cross_entropy(logits, labels).backward()
    assert error(logits, want) <= tolerance(torch.float32)[0]
    twin, plain = dict(reference.named_parameters()), dict(eager.named_parameters())
    for name, parameter in ours.named_parameters():
        limit = max(tolerance(torch.float32)[1], 2 * error(plain[name].grad, twin[name].grad))
        assert error(parameter.grad, twin[name].grad) <= limit, name
    buffers = dict(reference.named_buffers())
    for name, buffer in ours.named_buffers():
        assert error(buffer, buffers[name]) <= tolerance(torch.float32)[1], name
