"""ONNX export: the network as plain operators, any batch size, checked before the file appears.

The graph holds the reference maths (spec.md 1, 2 and 4) in evaluation mode, so every ONNX runtime
can run it; the fused kernels are not part of it.
"""

from __future__ import annotations

import copy
import inspect
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fused import FusedCIEMA, FusedMSFF

from .run_folder import require_writable, write_atomically

# ‖onnxruntime − module‖ / ‖module‖, both float32: goals.md allows this to Winograd-like forms.
TOLERANCE = 1e-4
CHECKED_BATCHES = (1, 2)
# Not one of those checked, so that a batch size frozen into the graph cannot pass; nor 1, which
# torch.export takes for a constant.
TRACED_BATCH = 3
OLDEST_OPSET = 18

_logger = logging.getLogger("mobilesteelnet")

Example = torch.Tensor | Sequence[torch.Tensor]


class ExportError(RuntimeError):
    """The module cannot be written as ONNX, or the result does not compute what the module does."""


def export_onnx(
    model: nn.Module,
    example: Example,
    path: str | os.PathLike[str],
    *,
    opset: int | None = None,
    check: bool = True,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write `model` as one .onnx file of standard operators; dimension 0 is free, the rest fixed.

    The evaluation form is exported, also of a model in training mode; `model` itself is not
    changed. The file appears only when it is complete and, with `check`, right: onnxruntime's
    results for random inputs at batch 1 and 2 must agree with the module to `TOLERANCE`; the
    largest relative error is logged.

    Args:
        model: `MobileSteelNet`, `FusedCIEMA`, `FusedMSFF`, or any float32 module that holds such
            layers and returns one tensor.
        example: what `model` is called with: a float32 tensor (B, C, H, W), or a list of maps
            for `FusedMSFF`. Only its shape counts, and not its batch size.
        path: the file to write; an old one is replaced.
        opset: of the standard operators, at least 18; None takes the exporter's own.
        check: run the file in onnxruntime and compare.
        metadata: texts to store in the file, as class names and normalisation.

    Returns:
        `path`. Inputs are named as the arguments of `model.forward`, the output `logits` for a
        network with a head and `out` for a layer.

    Raises:
        TypeError: `model`, `example` or `metadata` is of the wrong type or not float32.
        ValueError: `example` has the wrong shape for `model`, or `opset` is unknown.
        ImportError: the extra `[export]` is not installed.
        OSError: `path` cannot be written.
        ExportError: the exporter failed, or the file computes something else.
    """
    _require_extra("onnx", "onnxscript", *(["onnxruntime"] if check else []))
    target = Path(path)
    require_writable(target)
    _check_opset(opset)
    texts = _check_metadata(metadata)
    maps = _check_example(example)
    module = _evaluation_copy(model)
    is_list = not isinstance(example, torch.Tensor)
    probes = {b: _probe(maps, b) for b in (*CHECKED_BATCHES, TRACED_BATCH)}
    traced = _argument(probes[TRACED_BATCH], is_list)
    expected = _run(module, traced)
    if model.training:
        _logger.info("export: the model is in training mode; its evaluation form is written")

    names = _input_names(module, len(maps), is_list)
    output = "logits" if isinstance(getattr(module, "fc", None), nn.Linear) else "out"
    program = _trace(module, traced, names, output, opset)
    _replace_metadata(program.model, texts)

    def write(part: Path) -> None:
        try:
            program.save(str(part), external_data=False)
        except OSError:
            raise
        except Exception as error:  # protobuf's own classes, as for a file above 2 GB
            raise ExportError(f"the ONNX file cannot be written: {_first_line(error)}") from error
        if check:
            wanted = {b: _run(module, _argument(probes[b], is_list)) for b in CHECKED_BATCHES}
            worst = _check_file(part, probes, wanted | {TRACED_BATCH: expected}, names)
            _logger.info("export: largest relative error in onnxruntime %.1e", worst)

    write_atomically(target, write)
    return target


# ---------------------------------------------------------------------------------------- inputs


def _require_extra(*modules: str) -> None:
    import importlib

    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            message = f'{name} is missing: pip install "mobilesteelnet[export]"'
            raise ImportError(message, name=name) from error


def _check_opset(opset: int | None) -> None:
    if opset is None:
        return
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if isinstance(opset, bool) or not isinstance(opset, int):
        raise TypeError(f"opset must be an integer or None, got {opset!r}")
    if not OLDEST_OPSET <= opset <= newest:
        raise ValueError(f"opset={opset}, expected {OLDEST_OPSET} to {newest}")


def _check_metadata(metadata: Mapping[str, str] | None) -> dict[str, str]:
    texts = dict(metadata or {})
    for key, value in texts.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"metadata must map text to text, got {key!r}: {value!r}")
    return texts


def _check_example(example: Example) -> list[torch.Tensor]:
    maps = [example] if isinstance(example, torch.Tensor) else example
    if not isinstance(maps, (list, tuple)) or not maps:
        raise TypeError(f"example must be a tensor or a list of tensors, got {example!r}")
    for value in maps:
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"example must hold tensors, got {type(value).__name__}")
        if value.dtype != torch.float32:
            raise TypeError(f"example has dtype {value.dtype}, only torch.float32 is exported")
        if value.dim() != 4 or value.numel() == 0:
            raise ValueError(f"example has shape {tuple(value.shape)}, expected (B, C, H, W)")
    return list(maps)


def _evaluation_copy(model: nn.Module) -> nn.Module:
    """A copy of `model` on the CPU, in evaluation mode, its fused layers on plain PyTorch."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    tensors = (*model.named_parameters(), *model.named_buffers())
    for name, value in tensors:
        if value.is_floating_point() and value.dtype != torch.float32:
            raise TypeError(f"model: {name} is {value.dtype}, only torch.float32 is exported")
    module = copy.deepcopy(model).cpu().eval()
    for layer in module.modules():
        if isinstance(layer, (FusedCIEMA, FusedMSFF)):
            layer.backend = "reference"
    return module


def _probe(maps: Sequence[torch.Tensor], batch: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    return [torch.randn(batch, *m.shape[1:], generator=generator) for m in maps]


def _argument(maps: list[torch.Tensor], is_list: bool) -> Example:
    return maps if is_list else maps[0]


def _run(module: nn.Module, argument: Example) -> torch.Tensor:
    with torch.no_grad():
        try:
            out = module(argument)
        except (TypeError, ValueError):
            raise
        except RuntimeError as error:  # a kernel's complaint about a shape
            raise ValueError(f"example does not fit the model: {_first_line(error)}") from error
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"model must return one tensor, got {type(out).__name__}")
    return out


# ---------------------------------------------------------------------------------------- export


def _input_names(module: nn.Module, count: int, is_list: bool) -> list[str]:
    name = next(iter(inspect.signature(module.forward).parameters), "x")
    return [f"{name}_{i}" for i in range(count)] if is_list else [name]


def _trace(
    module: nn.Module, argument: Example, names: list[str], output: str, opset: int | None
) -> Any:
    """The exporter's program; its model is of the wanted opset and has standard operators only."""
    batch = {0: torch.export.Dim("batch", min=1)}
    logger = logging.getLogger("onnxscript")  # its notes on constants are for its developers
    level = logger.level
    logger.setLevel(logging.ERROR)
    dims: Any = batch if isinstance(argument, torch.Tensor) else [batch] * len(argument)
    try:
        with torch.no_grad():
            program = torch.onnx.export(
                module,
                (argument,),
                input_names=names,
                output_names=[output],
                opset_version=opset,
                dynamo=True,
                dynamic_shapes=(dims,),
                verbose=False,
            )
    except Exception as error:
        raise ExportError(f"the model cannot be exported: {_first_line(error)}") from error
    finally:
        logger.setLevel(level)
    assert program is not None
    model = program.model
    if opset is not None and model.opset_imports[""] != opset:
        got = model.opset_imports[""]
        raise ExportError(f"opset={opset} cannot be reached, the model needs opset {got}")
    foreign = {node.domain for node in model.graph.all_nodes()} - {""}
    if foreign or model.functions:
        raise ExportError(f"the model holds operators outside the standard: {sorted(foreign)}")
    return program


def _replace_metadata(model: Any, texts: dict[str, str]) -> None:
    """Drop what the exporter tells of this machine (stack traces with paths), keep `texts`."""
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    model.metadata_props.update(texts)


def _first_line(error: BaseException) -> str:
    """What went wrong: of the exporter's errors, which tell of its steps in colours, the cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    return plain.strip().split("\n", 1)[0] or type(error).__name__


# ----------------------------------------------------------------------------------------- check


def _check_file(
    path: Path,
    probes: Mapping[int, list[torch.Tensor]],
    expected: Mapping[int, torch.Tensor],
    names: Sequence[str],
) -> float:
    """Largest relative error of the file in onnxruntime over the batch sizes of `expected`."""
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own classes
        raise ExportError(f"onnxruntime refuses the file: {_first_line(error)}") from error
    worst = 0.0
    for batch, want in expected.items():
        feed = {name: m.numpy() for name, m in zip(names, probes[batch], strict=True)}
        try:
            (got,) = session.run(None, feed)
        except Exception as error:
            message = f"onnxruntime fails at batch {batch}: {_first_line(error)}"
            raise ExportError(message) from error
        result = torch.from_numpy(got)
        if result.shape != want.shape:
            shapes = f"{tuple(result.shape)} for {tuple(want.shape)}"
            raise ExportError(f"the file returns {shapes} at batch {batch}")
        difference = (result.double() - want.double()).norm().item()
        relative = difference / max(want.double().norm().item(), torch.finfo(torch.float32).tiny)
        # `not <=` also catches NaN.
        if not relative <= TOLERANCE:
            raise ExportError(
                f"the file computes something else: relative error {relative:.1e} at batch "
                f"{batch}, tolerance {TOLERANCE:.0e}"
            )
        worst = max(worst, relative)
    return worst
