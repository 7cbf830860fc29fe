"""The roofline's arithmetic, checked by hand; its figures are predictions and are not tested."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks import roofline, roofline_kernels
from benchmarks.roofline import GAP, REACHED, Device, Prediction
from benchmarks.roofline_kernels import Kernel
from mobilesteelnet.model import MobileSteelNet, describe

# 10 multiprocessors at 1 GHz: 256·2·4·10 = 20.48 TFLOPS on tensor cores; 600 GB/s, so that 360 kB
# have to be in flight.
DEVICE = Device("toy", "sm_80", 10, 1e9, 600e9, 256, 16)
KERNEL = Kernel(
    programs=10, threads=512, occupancy=50, wide_loads=4, products_per_issue=256, touched=100
)


def test_data_sheets_agree_with_the_rates() -> None:
    stated = {"H100": 989.4, "A100": 312, "RTX 3090": 71, "L4": 121, "Jetson Orin": 42.5}
    for device in roofline.DEVICES:
        peak = device.flops(device.tensor_rate) / 1e12
        assert peak == pytest.approx(stated[device.name], rel=0.01), device.name


def test_blocks_that_are_resident() -> None:
    assert roofline.resident_blocks(DEVICE, KERNEL) == 2  # half of 2048 threads
    assert roofline.resident_blocks(DEVICE, replace(KERNEL, occupancy=12)) == 1


def test_loads_in_flight_limit_the_bandwidth() -> None:
    in_flight = 10 * 512 * 16 * 4
    assert roofline.memory_share(DEVICE, KERNEL) == pytest.approx(REACHED * in_flight / 360e3)
    many = replace(KERNEL, programs=1000)  # two blocks on each multiprocessor: more than enough
    assert roofline.memory_share(DEVICE, many) == REACHED
    narrow = replace(KERNEL, wide_loads=0)
    assert roofline.memory_share(DEVICE, narrow) == roofline.memory_share(DEVICE, KERNEL) / 4


def test_mix_grid_and_occupancy_limit_the_arithmetic() -> None:
    warps = 512 / 32 / 4
    full = warps / (warps + 1)
    assert roofline.arithmetic_share(DEVICE, KERNEL) == pytest.approx(full)
    mixed = replace(KERNEL, products_per_issue=64)
    assert roofline.arithmetic_share(DEVICE, mixed) == pytest.approx(full / 4)
    uneven = replace(KERNEL, programs=11)  # two rounds for 1.1, two blocks a multiprocessor
    assert roofline.arithmetic_share(DEVICE, uneven) == pytest.approx(0.55 * 8 / 9)


def test_a_stage_shares_its_bytes_and_flop_among_its_kernels() -> None:
    copying = replace(KERNEL, products_per_issue=0, touched=300)
    found = roofline.predict("stage", DEVICE, 20_480_000, 400_000, [KERNEL, copying])
    share = roofline.memory_share(DEVICE, KERNEL)
    memory = 300_000 / (600e9 * share)
    arithmetic = 1e-6 / roofline.arithmetic_share(DEVICE, KERNEL)
    assert arithmetic > 100_000 / (600e9 * share)
    assert found.seconds == pytest.approx(memory + arithmetic + 2 * GAP)
    assert (found.flop, found.bytes, found.launches) == (20_480_000, 400_000, 2)
    assert found.bound == "launches"
    assert roofline.predict("stage", DEVICE, 10**12, 0, [KERNEL]).bound == "arithmetic"
    assert roofline.predict("stage", DEVICE, 0, 10**12, [KERNEL]).bound == "memory"


def test_without_tensor_cores_the_ordinary_rate_counts() -> None:
    plain = replace(KERNEL, products_per_issue=0)
    slow = roofline.predict("stage", DEVICE, 10**12, 0, [plain]).seconds - GAP
    quick = roofline.predict("stage", DEVICE, 10**12, 0, [KERNEL]).seconds - GAP
    assert slow == pytest.approx(quick * 256 / 16)


def test_the_backbone_counts_what_the_network_says() -> None:
    for batch in roofline.BATCHES:
        found = roofline.backbone(DEVICE, batch)
        assert found.flop == batch * describe(MobileSteelNet())["backbone_flop"]
        assert found.launches == 36  # 23 convolutions, 12 batch norms, one ReLU
    doubled = replace(DEVICE, bandwidth=1200e9, clock=2e9)
    gaps = GAP * found.launches
    halved = (roofline.backbone(DEVICE, 8).seconds - gaps) / 2
    assert roofline.backbone(doubled, 8).seconds - gaps == pytest.approx(halved)


def test_totals_add_up_and_name_the_longest() -> None:
    parts = [Prediction("a", 1, 2, 3, 0.25, "memory"), Prediction("b", 4, 5, 6, 0.5, "launches")]
    assert roofline.total("all", parts) == Prediction("all", 5, 7, 9, 0.75, "mostly b")
    text = roofline.as_text(DEVICE, 3, "cuda", [*parts, roofline.total("all", parts)])
    assert text.startswith("PREDICTION for toy (cuda kernels of sm_80)")
    assert "4 images a second" in text


def test_triton_kernels_come_from_launches_and_budgets() -> None:
    pytest.importorskip("triton")
    from benchmarks.triton_usage import label
    from fused.backends.triton.configs import Config
    from fused.backends.triton.launch import Launch

    x = torch.empty(8, 16, dtype=torch.float16)
    config = Config({"BLOCK_P": 64}, 8, 2)
    # x is given twice and as a view: its storage counts once.
    launch = Launch(lambda: None, (3, 4), (x, x[2:], 5, torch.empty(10)), {}, config)
    columns, row = ("occupancy", "wide_loads", "products_per_issue"), [50, 8, 200]
    other = {"sm_80": [25, 4, 100]}
    budget = {
        launch.name: {"half any P32 w4 s1": other, f"half any {label(config)}": {"sm_80": row}}
    }
    kernel = partial(roofline_kernels._triton_kernel, launch, "contiguous", "sm_80")
    assert kernel(budget, columns) == Kernel(12, 256, 50, 8, 200, 8 * 16 * 2 + 40)
    del budget[launch.name][f"half any {label(config)}"]
    like_another = kernel(budget, columns)
    assert (like_another.occupancy, like_another.threads) == (25, 256)
    with pytest.raises(LookupError, match="has no <lambda> on sm_80"):
        kernel({launch.name: {"single any P32 w4 s1": other}}, columns)


def test_cuda_kernels_come_from_launches_and_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")  # whose capture gives the arguments
    found = roofline_kernels.cuda_kernels("channel_interaction", 1, torch.float16, "sm_90", 132)
    gate, product = found
    assert (gate.products_per_issue, gate.threads) == (0, 512)
    assert (product.programs, product.threads) == (8 * 25, 256)  # tiles of 128 channels and pixels
    size = roofline.problem(1).channels * 56 * 56 * 2
    assert 2 * size + 1024 * 1024 * 2 <= product.touched < 1.1 * (2 * size + 1024 * 1024 * 2)
    monkeypatch.setattr("benchmarks.budgets.stored", dict)
    with pytest.raises(LookupError, match=r"no .* on sm_90: run `python benchmarks/budgets.py"):
        roofline_kernels.cuda_kernels("channel_interaction", 1, torch.float16, "sm_90", 132)


@pytest.mark.parametrize("batch", roofline.BATCHES)
def test_ops_cost_what_the_contract_says_of_their_stages(batch: int) -> None:
    sizes = roofline.problem(batch)
    one = [roofline.costs(op, sizes) for op in roofline.SPATIAL_STAGES]
    both = roofline.costs("spatial_gate", sizes)
    assert both == tuple(map(sum, zip(*one, strict=True)))
    flop, traffic = roofline.costs("gated_fusion", sizes)
    assert roofline.costs("gated_fusion_mean", sizes) == (
        flop,
        traffic - batch * 1024 * 56 * 56 * 2,
    )
