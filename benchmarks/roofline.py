"""Predicted times of every stage and of the network on GPUs that were not there: PREDICTIONS.

``python benchmarks/roofline.py`` prints them; nothing is measured. FLOP and bytes are those of
`fused.contract.cost`, launches and their grids those that the launchers make (captured without a
GPU), registers and instructions those of the compiled kernels (gpu_budgets.toml). The model:

* A stage's bytes, those of its own scratch among them, are shared among its kernels in proportion
  to the tensors that these touch; its FLOP among those with tensor-core instructions in proportion
  to their threads (if none has any, among all of them, at the rate of ordinary multiply-adds).
* A kernel takes the longer of its memory and its arithmetic time, and then `GAP` until the next
  one starts. Host code hides behind the GPU (or is in a CUDA graph); caches do not help.
* Memory: the bandwidth of the data sheet, times `REACHED`, times what is in flight over what would
  have to be (Little's law: bandwidth × `LATENCY`). In flight are 16 bytes for each of a thread's
  wide loads, at most `LOADS_AHEAD` of them, in all threads that are resident.
* Arithmetic: the peak, times three shares. The mix: a quarter of a multiprocessor issues one
  instruction a clock, so tensor cores wait if a loop has too few multiply-adds an instruction.
  Occupancy: w warps on a quarter hide w/(w+1) of the time. The grid: multiprocessors without a
  block in the last round idle.
* The backbone is PyTorch's: each layer a kernel that reads its input and writes its output, at
  `LIBRARY` of either peak, depthwise convolutions by ordinary multiply-adds.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a file: find the packages beside it
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import nn

from benchmarks.occupancy import MULTIPROCESSORS
from benchmarks.roofline_kernels import Kernel, cuda_kernels, triton_kernels
from fused.contract import STAGES, Problem, cost
from fused.evaluation_ops import spatial_gate
from mobilesteelnet.model import PAPER_INPUT_SIZE, MobileSteelNet

GAP = 3e-6
REACHED = 0.85
LATENCY = 600e-9
LOADS_AHEAD = 4
LIBRARY = 0.5
DTYPE = torch.float16
BATCHES = (1, 8)
KERNELS = {"triton": triton_kernels, "cuda": cuda_kernels}
# What evaluation calls, in order: the cuda backend has one op for two stages, whose costs add up.
SPATIAL_STAGES = ("coordinate_attention", "cross_spatial")
PARTS = {
    "triton": STAGES,
    "cuda": ("msff", "channel_interaction", spatial_gate.name, "gated_fusion"),
}


@dataclass(frozen=True)
class Device:
    """Figures of a data sheet.

    Attributes:
        name: as sold.
        target: whose compiled kernels stand for it.
        multiprocessors: of the chip as sold.
        clock: in Hz, when boosted.
        bandwidth: of its memory, bytes a second.
        tensor_rate: float16 multiply-adds with float32 sums a clock and quarter of a
            multiprocessor, dense.
        ordinary_rate: float32 ones without tensor cores.
    """

    name: str
    target: str
    multiprocessors: int
    clock: float
    bandwidth: float
    tensor_rate: int
    ordinary_rate: int

    def flops(self, rate: int) -> float:
        """FLOP a second at a rate of multiply-adds a clock and quarter."""
        return 2 * rate * 4 * self.multiprocessors * self.clock


DEVICES = (
    # NVIDIA H100 data sheet, SXM5: 989 TFLOPS float16 dense, 3.35 TB/s.
    Device("H100", "sm_90", 132, 1.830e9, 3350e9, 512, 32),
    # NVIDIA A100 data sheet, SXM4 80 GB: 312 TFLOPS float16 dense, 2039 GB/s.
    Device("A100", "sm_80", 108, 1.410e9, 2039e9, 256, 16),
    # NVIDIA GA102 white paper, RTX 3090: 71 TFLOPS float16 with float32 sums dense, 936 GB/s.
    Device("RTX 3090", "sm_86", 82, 1.695e9, 936e9, 64, 32),
    # NVIDIA L4 data sheet: 242 TFLOPS float16 sparse, so 121 dense, 300 GB/s.
    Device("L4", "sm_89", 58, 2.040e9, 300e9, 128, 32),
    # NVIDIA Jetson AGX Orin data sheet, 64 GB: 5.3 TFLOPS float32, 85 float16 sparse, so 42.5
    # dense, 204.8 GB/s. It is sm_87; the kernels compiled for sm_80 stand for it.
    Device("Jetson Orin", "sm_80", 16, 1.300e9, 204.8e9, 256, 32),
)


@dataclass(frozen=True)
class Prediction:
    """Seconds of a part of the network, what it does, and what holds it up."""

    name: str
    flop: int
    bytes: int
    launches: int
    seconds: float
    bound: str


# ------------------------------------------------------------------------------------------ model


def resident_blocks(device: Device, kernel: Kernel) -> int:
    """Blocks of a full multiprocessor."""
    limit = MULTIPROCESSORS[int(device.target.removeprefix("sm_"))].threads
    return max(1, kernel.occupancy * limit // 100 // kernel.threads)


def memory_share(device: Device, kernel: Kernel) -> float:
    """Share of the bandwidth that a kernel's loads in flight can ask for."""
    blocks = min(kernel.programs, device.multiprocessors * resident_blocks(device, kernel))
    ahead = 16 * max(1, min(kernel.wide_loads, LOADS_AHEAD))
    return REACHED * min(1.0, blocks * kernel.threads * ahead / (device.bandwidth * LATENCY))


def arithmetic_share(device: Device, kernel: Kernel) -> float:
    """Share of the peak that a kernel's instructions, warps and grid leave."""
    mix = 1.0
    if kernel.products_per_issue > 0:
        mix = min(1.0, kernel.products_per_issue / device.tensor_rate)
    rounds = -(-kernel.programs // device.multiprocessors)
    grid = kernel.programs / (rounds * device.multiprocessors)
    warps = min(rounds, resident_blocks(device, kernel)) * kernel.threads / 32 / 4
    return mix * grid * warps / (warps + 1)


def predict(
    name: str, device: Device, flop: int, traffic: int, kernels: Sequence[Kernel]
) -> Prediction:
    """The time of a stage from its FLOP and bytes and the kernels that share them."""
    on_tensor_cores = [k for k in kernels if k.products_per_issue > 0]
    workers = on_tensor_cores or kernels
    rate = device.tensor_rate if on_tensor_cores else device.ordinary_rate
    threads = sum(k.programs * k.threads for k in workers)
    touched = sum(k.touched for k in kernels)
    seconds, by_bound = 0.0, {"memory": 0.0, "arithmetic": 0.0, "launches": GAP * len(kernels)}
    for kernel in kernels:
        memory = traffic * kernel.touched / touched
        memory /= device.bandwidth * memory_share(device, kernel)
        arithmetic = 0.0
        if kernel in workers:
            arithmetic = flop * kernel.programs * kernel.threads / threads
            arithmetic /= device.flops(rate) * arithmetic_share(device, kernel)
        by_bound["memory" if memory > arithmetic else "arithmetic"] += max(memory, arithmetic)
        seconds += max(memory, arithmetic) + GAP
    bound = max(by_bound, key=lambda key: by_bound[key])
    return Prediction(name, flop, traffic, len(kernels), seconds, bound)


def total(name: str, parts: Sequence[Prediction]) -> Prediction:
    """The parts one after another."""
    longest = max(parts, key=lambda part: part.seconds)
    return Prediction(
        name,
        sum(part.flop for part in parts),
        sum(part.bytes for part in parts),
        sum(part.launches for part in parts),
        sum(part.seconds for part in parts),
        f"mostly {longest.name}",
    )


# ---------------------------------------------------------------------------------------- backbone


def backbone(device: Device, batch: int) -> Prediction:
    """The convolutional stages of MobileSteelNet, layer by layer, in float16."""
    network = MobileSteelNet().to("meta").eval()
    layers: list[tuple[int, int, bool]] = []

    def seen(layer: nn.Module, inputs: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        flop, weights = 0, 0
        if isinstance(layer, nn.Conv2d):
            weights = layer.weight.numel()
            flop = 2 * out.numel() * weights // layer.out_channels
        traffic = (inputs[0].numel() + out.numel() + weights) * DTYPE.itemsize
        layers.append((flop, traffic, getattr(layer, "groups", 1) > 1))

    for layer in network.modules():
        if not list(layer.children()):
            layer.register_forward_hook(seen)
    size = PAPER_INPUT_SIZE
    with torch.no_grad():
        network.backbone(torch.empty(batch, 3, size, size, device="meta"))
    seconds, arithmetic_bound = 0.0, 0
    for flop, traffic, depthwise in layers:
        rate = device.ordinary_rate if depthwise else device.tensor_rate
        arithmetic = flop / device.flops(rate) / LIBRARY
        memory = traffic / device.bandwidth / LIBRARY
        seconds += max(arithmetic, memory) + GAP
        arithmetic_bound += arithmetic > memory
    bound = "arithmetic" if 2 * arithmetic_bound > len(layers) else "memory"
    if GAP * len(layers) > seconds / 2:
        bound = "launches"
    flop, traffic = sum(layer[0] for layer in layers), sum(layer[1] for layer in layers)
    return Prediction("backbone", flop, traffic, len(layers), seconds, bound)


# ------------------------------------------------------------------------------------------ stages


def problem(batch: int) -> Problem:
    """The paper's sizes."""
    from benchmarks.triton_capture import CHANNELS, FEATURES, GROUPS, SIZE

    features = tuple((channels, size, size) for channels, size in FEATURES)
    return Problem(
        batch, CHANNELS, SIZE, SIZE, groups=GROUPS, features=features, statistics_known=True
    )


def costs(op: str, sizes: Problem) -> tuple[int, int]:
    """FLOP and bytes of an evaluation op, those of its scratch among them."""
    stages = SPATIAL_STAGES if op == spatial_gate.name else (op.removesuffix("_mean"),)
    least = [cost(stage, sizes, dtype=DTYPE) for stage in stages]
    traffic = sum(one.bytes + one.scratch for one in least)
    if op.endswith("_mean"):  # which leaves out unwritten
        traffic -= sizes.channels * sizes.pixels * DTYPE.itemsize
    return sum(one.flop for one in least), traffic


def network(device: Device, batch: int, backend: str) -> list[Prediction]:
    """The parts of MobileSteelNet in evaluation, and their sum."""
    sizes = problem(batch)

    def part(op: str) -> Prediction:
        kernels = KERNELS[backend](op, batch, DTYPE, device.target, device.multiprocessors)
        return predict(op, device, *costs(op, sizes), kernels)

    parts = [backbone(device, batch), *map(part, PARTS[backend])]
    ciema = total("CIEMA", parts[2:])
    means = part("gated_fusion_mean")  # all that the head reads
    head = Prediction("head", 0, 0, 1, GAP, "launches")
    return [*parts, ciema, means, head, total("network", [*parts[:-1], means, head])]


def as_text(device: Device, batch: int, backend: str, parts: Sequence[Prediction]) -> str:
    """A table for one device, batch and backend."""
    kernels = f"{backend} kernels of {device.target}"
    lines = [f"PREDICTION for {device.name} ({kernels}), float16, batch {batch}"]
    for part in parts:
        lines.append(
            f"  {part.name:22} {part.flop / 1e9:7.2f} GFLOP {part.bytes / 1e6:7.1f} MB"
            f" {part.launches:4} launches {part.seconds * 1e6:9.1f} µs  {part.bound}"
        )
    lines.append(f"  {batch / parts[-1].seconds:.0f} images a second")
    return "\n".join(lines)


def main() -> int:
    """Prints the predictions; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [device.name for device in DEVICES]
    parser.add_argument("--device", action="append", choices=names, help="only this; repeatable")
    parser.add_argument(
        "--backend", action="append", choices=list(KERNELS), help="only this; repeatable"
    )
    options = parser.parse_args()
    print(
        f"PREDICTIONS of the model in this file's docstring, not measurements: gap {GAP * 1e6:.0f}"
        f" µs, {REACHED:.0%} of the bandwidth, latency {LATENCY * 1e9:.0f} ns, {LIBRARY:.0%} of"
        " either peak for PyTorch's layers.\n"
    )
    asked = [device for device in DEVICES if device.name in (options.device or names)]
    try:
        for device, batch in itertools.product(asked, BATCHES):
            for backend in options.backend or KERNELS:
                print(as_text(device, batch, backend, network(device, batch, backend)) + "\n")
    except LookupError as error:
        print(error.args[0], file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
