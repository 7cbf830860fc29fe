"""What a network costs on this machine: parameters, FLOP, latency, and the time to train it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from fused import optimize_for_inference

from ..initialisation import build_model
from ..model import MobileSteelNet
from ..networks import build_network, describe_network
from ..run_folder import RunFolderError
from ..train_config import TrainConfig
from .grid import NETWORKS
from .runner import FORMAT, WAY_OUT, machine_facts, read_result

CLASSES = 6
ESTIMATE_IMAGES = 2


def measure_cost(
    network: str,
    *,
    device: torch.device,
    size: int = 224,
    batch: int = 4,
    repeats: int = 20,
    backend: str | None = None,
) -> dict[str, Any]:
    """Measure a network of :data:`mobilesteelnet.reproduction.grid.NETWORKS`; JSON-able.

    Of MobileSteelNet and its ablations on a CPU, the frozen copy as well, by which they predict.

    Args:
        network: Its key.
        device: Where it runs.
        size: Height and width of the images.
        batch: Images of a training step.
        repeats: Of the forward; a training step is taken a quarter as often.
        backend: Of the fused stages.
    """
    model, facts = _build(network, size, backend)
    model = model.to(device).eval()
    images = torch.randn(1, 3, size, size, device=device)
    with torch.inference_mode():
        forward = _median_seconds(lambda: model(images), device, repeats)
    frozen = {}
    if isinstance(model, MobileSteelNet) and device.type == "cpu":
        quick = optimize_for_inference(model)
        with torch.inference_mode():
            frozen["frozen_seconds"] = _median_seconds(lambda: quick(images), device, repeats)
        del quick
    step = training_step_seconds(
        model.train(), device=device, size=size, batch=batch, repeats=max(repeats // 4, 1)
    )
    return {
        "format": FORMAT,
        "network": network,
        "input_size": size,
        "parameters": facts["parameters"],
        "float32_bytes": facts["float32_bytes"],
        "published_flop": facts["published_flop"],
        "flop": facts["flop"],
        "forward_seconds": forward,
        "images_per_second": 1 / forward,
        "training_batch": batch,
        "training_seconds_an_image": step / batch,
        "backend": backend,
        **frozen,
        "machine": machine_facts(device),
    }


def stored_cost(path: Path, size: int, batch: int, backend: str | None) -> dict[str, Any] | None:
    """What was measured before; None if there is nothing.

    Raises:
        RunFolderError: It is of other options.
    """
    if not path.is_file():
        return None
    found = read_result(path)
    wanted = {"input_size": size, "training_batch": batch, "backend": backend}
    for key, value in wanted.items():
        if found.get(key) != value:
            raise RunFolderError(
                f"result {str(path)!r} was made with other options ({key}={found.get(key)!r}, not "
                f"{value!r}): {WAY_OUT}"
            )
    return found


def count_flop(network: str, size: int) -> int:
    """FLOP of one image of ``size``×``size``; nothing is timed."""
    return int(_build(network, size, None)[1]["flop"])


def step_estimate(config: TrainConfig, device: torch.device) -> float:
    """Seconds that one image of a training takes, from two steps; for plans, not for tables."""
    model = build_model(config, [f"class_{number}" for number in range(CLASSES)])
    model = model.to(device).train()
    step = training_step_seconds(
        model, device=device, size=config.size, batch=ESTIMATE_IMAGES, repeats=1
    )
    return step / ESTIMATE_IMAGES


def training_step_seconds(
    model: torch.nn.Module, *, device: torch.device, size: int, batch: int, repeats: int
) -> float:
    """Median seconds of forward, backward and the optimizer's step, after one to warm up."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    images = torch.randn(batch, 3, size, size, device=device)
    labels = torch.arange(batch, device=device) % CLASSES

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return _median_seconds(step, device, repeats)


def _build(network: str, size: int, backend: str | None) -> tuple[torch.nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    options = {"num_classes": CLASSES, **NETWORKS[network].options, "backend": backend}
    model = build_network(options)
    return model, describe_network(model, size)


def _median_seconds(work: Callable[[], Any], device: torch.device, repeats: int) -> float:
    times = []
    for number in range(repeats + 1):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        if number:  # the first one pays for allocations and the choice of kernels
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
