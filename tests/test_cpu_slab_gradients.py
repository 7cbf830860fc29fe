"""Backward of the native slab kernels, and their forward in training: tails, layouts, bits."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from stage_cases import LAYOUTS, OPS, Sizes, arguments, convert, error, layout_of, tolerance
from test_cpu_cross_spatial import CHANNELS, DTYPES, MAPS, STAGES, rounded

from fused.backends import cpu, reference
from fused.contract import memory_format


def forward_and_backward(
    kernels: Any, op: str, args: list[Any], grads: list[torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Outputs of an op and the gradients of its inputs, for `grads` of the differentiable ones."""
    outputs = kernels[op](*args)
    named = dict(zip(OPS[op].inputs, args, strict=True))
    named |= dict(zip(OPS[op].outputs, outputs, strict=True))
    pairs = zip(OPS[op].differentiable, grads, strict=True)
    named |= {f"grad_{name}": grad for name, grad in pairs}
    return list(outputs), list(
        kernels[f"{op}_backward"](*(named[k] for k in OPS[op].backward_inputs))
    )


def seeds(op: str, sizes: Sizes, dtype: torch.dtype) -> list[torch.Tensor]:
    """Gradients of the differentiable outputs."""
    generator = torch.Generator().manual_seed(7)
    b, c, h, w, g = sizes.batch, sizes.channels, sizes.height, sizes.width, sizes.groups
    shapes = [(b, g, h, w)] if op == "cross_spatial" else [(b, c, h), (b, c, w), (b, c), (b, c)]
    kind = dtype if op == "cross_spatial" else torch.float32
    return [torch.randn(shape, generator=generator).to(kind) for shape in shapes]


def training_cases(op: str) -> list[tuple[bool, str]]:
    """Training or not, and whose batch statistics."""
    own, shared, none = (True, "sequential"), (True, "pooled"), (False, "sequential")
    return [own, shared, none] if op == "cross_spatial" else [none]


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("op", STAGES)
def test_gradients_for_every_number_of_channels_and_size_of_map(op, channels):
    maps = MAPS if channels <= 32 else MAPS[:7:2]  # the oracle's time grows with the square
    for (height, width), (training, whose) in itertools.product(maps, training_cases(op)):
        groups = 1 if channels > 32 else 2
        sizes = Sizes(2, channels * groups, height, width, groups)
        named = arguments(op, sizes, training, whose)
        args = convert(op, named, torch.float32, "contiguous")
        grads = seeds(op, sizes, torch.float32)
        outputs, got = forward_and_backward(cpu.KERNELS, op, args, grads)
        exact = [named[k] for k in OPS[op].inputs]
        want_outputs, want = forward_and_backward(
            reference.KERNELS, op, exact, [g.double() for g in grads]
        )
        # Batch norm makes ±1 of two values: what is left of a gradient is eps's and rounding's.
        lost = training and height * width == 1
        for mine, its in zip(outputs, want_outputs, strict=True):
            assert error(mine, its) <= (4e-5 if lost else 1e-5), (sizes, training, whose)
        # With one channel a parameter's gradient is one number, in which the pixels' may cancel:
        # eager's float32 is no better.
        plain = forward_and_backward(reference.KERNELS, op, args, grads)[1]
        for name, mine, eager, its in zip(OPS[op].gradients, got, plain, want, strict=True):
            assert mine.shape == its.shape
            limit = max(1e-3 if lost else tolerance(torch.float32)[1], 2 * error(eager, its))
            assert error(mine, its) <= limit, (name, sizes, training, whose)


@pytest.mark.parametrize("channels", [15, 16, 20, 32, 48])
def test_gradients_of_bfloat16_maps(channels):
    """From 16 channels and 64 values on multiplied as bfloat16, where the processor does that."""
    op, dtype = "cross_spatial", torch.bfloat16
    maps = ((2, 31, 1), (2, 32, 1), (3, 9, 14), (1, 28, 30))
    for (batch, height, width), (training, whose) in itertools.product(maps, training_cases(op)):
        sizes = Sizes(batch, channels * 2, height, width, 2)
        args = convert(op, arguments(op, sizes, training, whose), dtype, "contiguous")
        grads = seeds(op, sizes, dtype)
        exact = [a.double() if isinstance(a, torch.Tensor) else a for a in args]
        outputs, got = forward_and_backward(cpu.KERNELS, op, args, grads)
        want_outputs, want = forward_and_backward(
            reference.KERNELS, op, exact, [g.double() for g in grads]
        )
        for mine, its in zip(outputs, want_outputs, strict=True):
            assert error(mine, its) <= tolerance(dtype)[0], (sizes, training, whose)
        # alpha's gradient is a small difference of large sums, of w rounded to bfloat16 too.
        plain = forward_and_backward(reference.KERNELS, op, args, grads)[1]
        for name, mine, eager, its in zip(OPS[op].gradients, got, plain, want, strict=True):
            limit = max(tolerance(dtype)[1], 2 * error(eager, its))
            assert error(mine, its) <= limit, (name, sizes, training, whose)


def test_attention_of_bfloat16_maps_saturates_and_passes_nan():
    """Logits past e^±88, and one bad pixel: its group is lost, the other is not."""
    sizes = Sizes(2, 64, 9, 14, 2)
    op, dtype = "cross_spatial", torch.bfloat16
    named = arguments(op, sizes, True)
    named["attention_bn_weight"] = named["attention_bn_weight"] * 1e4
    args = convert(op, named, dtype, "contiguous")
    want = reference.KERNELS[op](*args)
    got = cpu.KERNELS[op](*args)
    assert all(error(a, b.double()) <= tolerance(dtype)[0] for a, b in zip(got, want, strict=True))
    args[0] = args[0].clone()
    args[0][1, 3, 4, 5] = torch.nan
    w = cpu.KERNELS[op](*args)[0]
    assert w[:, 0].isnan().all()
    assert torch.equal(w[:, 1], got[0][:, 1])


def test_pooled_statistics_of_more_groups_than_memory_keeps():
    """Over 2 GB of scratch each phase computes again what the one before did."""
    sizes = Sizes(2, 512, 48, 48, 512)
    named = arguments("cross_spatial", sizes, True, "pooled")
    args = convert("cross_spatial", named, torch.float32, "contiguous")
    grads = seeds("cross_spatial", sizes, torch.float32)
    outputs, got = forward_and_backward(cpu.KERNELS, "cross_spatial", args, grads)
    want_outputs, want = forward_and_backward(reference.KERNELS, "cross_spatial", args, grads)
    for mine, its in zip([*outputs, *got], [*want_outputs, *want], strict=True):
        assert error(mine, its.double()) <= 1e-3  # the float32 sums of either


@pytest.mark.parametrize("layout", [*LAYOUTS, "channel_slice"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", STAGES)
def test_gradients_of_every_layout_have_the_same_bits(op, dtype, layout):
    for sizes in (Sizes(2, 40, 9, 14, 2), Sizes(2, 6, 5, 1, 2), Sizes(3, 1, 4, 18, 1)):
        for training, whose in training_cases(op):
            named = rounded(arguments(op, sizes, training, whose), dtype)
            args = convert(op, named, dtype, "contiguous")
            grads = seeds(op, sizes, dtype)
            plain = args[0]
            if layout == "channel_slice":
                wide = plain.new_zeros(sizes.batch, sizes.height, sizes.width, sizes.channels + 3)
                wide[..., 1:-2] = plain.permute(0, 2, 3, 1)
                args[0] = wide.permute(0, 3, 1, 2)[:, 1:-2]
            else:
                args[0] = layout_of(plain, layout)
            got = forward_and_backward(cpu.KERNELS, op, args, grads)[1]
            want = forward_and_backward(cpu.KERNELS, op, [plain, *args[1:]], grads)[1]
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
            assert memory_format(got[0]) == memory_format(args[0])


@pytest.mark.parametrize("op", STAGES)
def test_gradients_have_the_same_bits_with_any_number_of_threads(op):
    before = torch.get_num_threads()
    sizes = Sizes(2, 96, 15, 14, 3)
    grads = seeds(op, sizes, torch.float32)
    try:
        for training, whose in training_cases(op):
            named = arguments(op, sizes, training, whose)
            args = convert(op, named, torch.float32, "contiguous")
            runs = []
            for threads in (1, 2, 3, 1):
                torch.set_num_threads(threads)
                outputs, gradients = forward_and_backward(cpu.KERNELS, op, args, grads)
                runs.append([*outputs, *gradients])
            for run in runs[1:]:
                assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))
    finally:
        torch.set_num_threads(before)


def test_a_forward_of_one_backend_meets_a_backward_of_the_other():
    sizes = Sizes(2, 64, 10, 9, 2)
    cases = [(op, *case) for op in STAGES for case in training_cases(op)]
    for op, training, whose in cases:
        named = arguments(op, sizes, training, whose)
        args = convert(op, named, torch.float32, "contiguous")
        grads = seeds(op, sizes, torch.float32)
        want = forward_and_backward(reference.KERNELS, op, args, grads)[1]
        for forward, backward in ((cpu, reference), (reference, cpu)):
            mixed = {op: forward.KERNELS[op], f"{op}_backward": backward.KERNELS[f"{op}_backward"]}
            got = forward_and_backward(mixed, op, args, grads)[1]
            for name, mine, its in zip(OPS[op].gradients, got, want, strict=True):
                assert error(mine, its) <= tolerance(torch.float32)[1], name
