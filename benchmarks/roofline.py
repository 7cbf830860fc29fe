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
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: find the packages beside it
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import nn

from benchmarks.occupancy import MULTIPROCESSORS
from fused.contract import STAGES, Problem, cost
from mobilesteelnet.model import PAPER_INPUT_SIZE, MobileSteelNet

GAP = 3e-6
REACHED = 0.85
LATENCY = 600e-9
LOADS_AHEAD = 4
LIBRARY = 0.5
DTYPE = torch.float16
BATCHES = (1, 8)


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
class Kernel:
    """One launch as the model sees it.

    Attributes:
        programs: blocks of the grid.
        threads: of a block.
        occupancy: percent of a multiprocessor's threads that are resident.
        wide_loads: 16-byte loads of a thread.
        products_per_issue: tensor-core multiply-adds an instruction; 0 without tensor cores.
        touched: bytes of the tensors that it is given.
    """

    programs: int
    threads: int
    occupancy: int
    wide_loads: int
    products_per_issue: int
    touched: int


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


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors(value)


def kernels_of(
    call: Any, device: Device, budget: Mapping[str, Any], columns: Sequence[str]
) -> list[Kernel]:
    """The launches of an op on this device, with what the budgets know of their kernels.

    A configuration without a budget is taken to be like another of its kernel.

    Raises:
        LookupError: the budgets do not have a kernel at all.
    """
    from benchmarks.triton_capture import capture
    from benchmarks.triton_compile import TARGETS, Target
    from benchmarks.triton_usage import label

    like = TARGETS[device.target]
    target = Target(like.name, like.shared_bytes, device.multiprocessors)
    found = []
    for launch in capture(call, DTYPE, target):
        rows = {
            name: by_target[like.name]
            for name, by_target in budget.get(launch.name, {}).items()
            if name.startswith("half") and like.name in by_target
        }
        names = [f"half {layout} {label(launch.config)}" for layout in (call.layout, "any")]
        values = [rows[name] for name in names if name in rows] or list(rows.values())
        if not values:
            raise LookupError(f"gpu_budgets.toml has no {launch.name} on {like.name}")
        code = dict(zip(columns, values[0], strict=True))
        storages = {
            a.untyped_storage()._cdata: a.untyped_storage().nbytes() for a in _tensors(launch.args)
        }
        found.append(
            Kernel(
                programs=prod(launch.grid),
                threads=32 * launch.config.num_warps,
                occupancy=code["occupancy"],
                wide_loads=code["wide_loads"],
                products_per_issue=code["products_per_issue"],
                touched=sum(storages.values()),
            )
        )
    return found


def network(device: Device, batch: int) -> list[Prediction]:
    """The parts of MobileSteelNet in evaluation, and their sum."""
    from benchmarks.triton_budgets import COLUMNS, stored
    from benchmarks.triton_capture import Call

    _, budget = stored()
    sizes = problem(batch)
    map_bytes = batch * sizes.channels * sizes.pixels * DTYPE.itemsize

    def stage(name: str, op: str, unwritten: int = 0) -> Prediction:
        least = cost(name, sizes, dtype=DTYPE)
        kernels = kernels_of(Call(op, training=False, batch=batch), device, budget, COLUMNS)
        traffic = least.bytes + least.scratch - unwritten
        return predict(op, device, least.flop, traffic, kernels)

    parts = [backbone(device, batch), *(stage(name, name) for name in STAGES)]
    ciema = total("CIEMA", parts[2:])
    means = stage(STAGES[-1], "gated_fusion_mean", unwritten=map_bytes)  # all that the head reads
    head = Prediction("head", 0, 0, 1, GAP, "launches")
    return [*parts, ciema, means, head, total("network", [*parts[:-1], means, head])]


def as_text(device: Device, batch: int, parts: Sequence[Prediction]) -> str:
    """A table for one device and batch."""
    lines = [f"PREDICTION for {device.name} (kernels of {device.target}), float16, batch {batch}"]
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
    options = parser.parse_args()
    print(
        f"PREDICTIONS of the model in this file's docstring, not measurements: gap {GAP * 1e6:.0f}"
        f" µs, {REACHED:.0%} of the bandwidth, latency {LATENCY * 1e9:.0f} ns, {LIBRARY:.0%} of"
        " either peak for PyTorch's layers.\n"
    )
    try:
        for device in DEVICES:
            if device.name in (options.device or names):
                for batch in BATCHES:
                    print(as_text(device, batch, network(device, batch)) + "\n")
    except LookupError as error:
        print(f"{error}: run `python benchmarks/triton_budgets.py --update`", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
