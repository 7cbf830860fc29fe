"""The kernels that the GPU backends start, as the roofline's model sees them.

Launches and grids are captured without a GPU; registers and instructions are those of
gpu_budgets.toml. Both take the paper's sizes in evaluation, NCHW.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch


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


def bytes_of(values: Iterable[Any]) -> int:
    """Bytes of the storages of all tensors among `values`, each once."""
    storages = (tensor.untyped_storage() for tensor in _tensors(values))
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors(value)


def cuda_kernels(
    op: str, batch: int, dtype: torch.dtype, target: str, multiprocessors: int
) -> list[Kernel]:
    """The kernels that the cuda backend starts for an op.

    Args:
        op: of `fused.backends.cuda`, in evaluation.
        batch: samples.
        dtype: of the maps.
        target: architecture whose budgets stand for the GPU's, as ``sm_90``.
        multiprocessors: of the GPU.

    Raises:
        LookupError: gpu_budgets.toml does not have a kernel.
    """
    from benchmarks import cuda_capture
    from benchmarks.budgets import stored
    from benchmarks.triton_capture import Call

    budgets, found = stored(), []
    entries = cuda_capture.entries(Call(op, training=False, batch=batch), dtype, multiprocessors)
    for entry in entries:
        made = cuda_capture.dry([entry])
        for one in made:
            row = budgets.get(cuda_capture.file_of(one), {}).get(one.kernel, {}).get(target)
            if row is None:
                raise LookupError(
                    f"gpu_budgets.toml has no {one.kernel} on {target}: "
                    "run `python benchmarks/budgets.py --update`"
                )
            found.append(
                Kernel(
                    programs=prod(one.grid),
                    threads=one.threads,
                    occupancy=row["occupancy"],
                    wide_loads=row["wide_loads"],
                    products_per_issue=row["products_per_issue"],
                    touched=bytes_of(entry.buffers.values()) // len(made),
                )
            )
    return found


def triton_kernels(
    op: str, batch: int, dtype: torch.dtype, target: str, multiprocessors: int
) -> list[Kernel]:
    """The same for the triton backend."""
    from benchmarks.triton_budgets import COLUMNS, stored
    from benchmarks.triton_capture import Call, capture
    from benchmarks.triton_compile import TARGETS

    call = Call(op, training=False, batch=batch)
    on = replace(TARGETS[target], multiprocessors=multiprocessors)
    launches = capture(call, dtype, on)
    return [_triton_kernel(one, call.layout, target, stored()[1], COLUMNS) for one in launches]


def _triton_kernel(
    launch: Any, layout: str, target: str, budget: Mapping[str, Any], columns: Sequence[str]
) -> Kernel:
    """One launch; a configuration without a budget is taken to be like another of its kernel."""
    from benchmarks.triton_usage import label

    rows = {
        name: by_target[target]
        for name, by_target in budget.get(launch.name, {}).items()
        if name.startswith("half") and target in by_target
    }
    names = [f"half {where} {label(launch.config)}" for where in (layout, "any")]
    values = [rows[name] for name in names if name in rows] or list(rows.values())
    if not values:
        raise LookupError(
            f"gpu_budgets.toml has no {launch.name} on {target}: "
            "run `python benchmarks/triton_budgets.py --update`"
        )
    code = dict(zip(columns, values[0], strict=True))
    return Kernel(
        programs=prod(launch.grid),
        threads=32 * launch.config.num_warps,
        occupancy=code["occupancy"],
        wide_loads=code["wide_loads"],
        products_per_issue=code["products_per_issue"],
        touched=bytes_of(launch.args),
    )
