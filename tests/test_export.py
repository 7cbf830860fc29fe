"""ONNX export: round trips through onnxruntime, the file's form, and every way it can fail."""

from __future__ import annotations

import builtins
import copy
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fused import FusedCIEMA, FusedMSFF, set_backend
from mobilesteelnet import export
from mobilesteelnet.export import ExportError, export_onnx
from mobilesteelnet.model import MobileSteelNet

onnx = pytest.importorskip("onnx", reason="extra [export] is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="extra [export] is not installed")

SIZE = 64


def jiggle(module: nn.Module) -> nn.Module:
    """Norms with weights and buffers that matter, so that a forgotten one shows."""
    generator = torch.Generator().manual_seed(7)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor in (layer.weight.data, layer.bias.data, layer.running_mean):
                tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
            layer.running_var.mul_(1 + torch.rand(layer.running_var.shape, generator=generator))
    return module.eval()


def small_network(**options: Any) -> MobileSteelNet:
    return jiggle(MobileSteelNet(width=0.125, **options))  # type: ignore[return-value]


def run_file(path: Path, *inputs: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    feed = {n: x.numpy() for n, x in zip(names, inputs, strict=True)}
    return torch.from_numpy(session.run(None, feed)[0])


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


@pytest.fixture(scope="module")
def network_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[MobileSteelNet, Path]:
    torch.manual_seed(0)
    model = small_network()
    path = tmp_path_factory.mktemp("export") / "network.onnx"
    texts = {"classes": '["crazing", "scratches"]'}
    return model, export_onnx(model, torch.zeros(1, 3, SIZE, SIZE), path, metadata=texts)


@pytest.fixture(scope="module")
def layer() -> FusedCIEMA:
    torch.manual_seed(0)
    return jiggle(FusedCIEMA(16, 4))  # type: ignore[return-value]


# ------------------------------------------------------------------------------------ round trips


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_network_round_trip(network_file: tuple[MobileSteelNet, Path], batch: int) -> None:
    model, path = network_file
    images = torch.randn(batch, 3, SIZE, SIZE)
    with torch.no_grad():
        want = model(images)
    got = run_file(path, images)
    assert got.shape == (batch, 6)
    assert relative(got, want) < 1e-5


def test_file_is_plain_and_alone(network_file: tuple[MobileSteelNet, Path]) -> None:
    _, path = network_file
    assert [p.name for p in path.parent.iterdir()] == ["network.onnx"]
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    assert [i.name for i in model.graph.input] == ["images"]
    assert [o.name for o in model.graph.output] == ["logits"]
    shape = model.graph.input[0].type.tensor_type.shape.dim
    assert shape[0].dim_param
    assert [d.dim_value for d in shape[1:]] == [3, SIZE, SIZE]
    assert {p.key: p.value for p in model.metadata_props} == {"classes": '["crazing", "scratches"]'}


def test_file_tells_nothing_of_this_machine(network_file: tuple[MobileSteelNet, Path]) -> None:
    _, path = network_file
    content = path.read_bytes()
    root = Path(export.__file__).resolve().parents[1]
    assert str(root).encode() not in content
    assert Path(torch.__file__).parent.as_posix().encode() not in content


@pytest.mark.parametrize(
    "options",
    [
        {"attention": "none"},
        {"fusion": "none", "num_classes": 2, "in_channels": 1},
        {"activation": "relu", "bn_statistics": "pooled"},
    ],
    ids=["no attention", "no fusion", "relu"],
)
def test_network_variants(options: dict[str, Any], tmp_path: Path) -> None:
    model = small_network(**options)
    images = torch.randn(2, options.get("in_channels", 3), SIZE, SIZE)
    path = export_onnx(model, images, tmp_path / "n.onnx")
    with torch.no_grad():
        assert relative(run_file(path, images), model(images)) < 1e-5


def test_attention_layer_alone_at_odd_sizes(layer: FusedCIEMA, tmp_path: Path) -> None:
    path = export_onnx(layer, torch.zeros(4, 16, 7, 5), tmp_path / "ciema.onnx")
    for batch in (1, 3):
        x = torch.randn(batch, 16, 7, 5)
        with torch.no_grad():
            assert relative(run_file(path, x), layer(x)) < 1e-5


@pytest.mark.parametrize("size", [(1, 5), (2, 2), (1, 1)], ids=str)
def test_maps_of_fewer_pixels_than_hidden_channels(size: tuple[int, int], tmp_path: Path) -> None:
    """Whether folding would pay depends on the batch, which is free in the file."""
    block = FusedCIEMA(64, 4).eval()
    path = export_onnx(block, torch.zeros(3, 64, *size), tmp_path / "ciema.onnx")
    for batch in (1, 8):
        x = torch.randn(batch, 64, *size)
        with torch.no_grad():
            assert relative(run_file(path, x), block(x)) < 1e-5


def test_fusion_layer_takes_a_list(tmp_path: Path) -> None:
    layer = jiggle(FusedMSFF((4, 6), 8))
    maps = [torch.randn(2, 4, 9, 8), torch.randn(2, 6, 5, 3)]
    path = export_onnx(layer, maps, tmp_path / "msff.onnx")
    with torch.no_grad():
        assert relative(run_file(path, *maps), layer(maps)) < 1e-5
    assert [i.name for i in onnx.load(path).graph.input] == ["features_0", "features_1"]


def test_layers_inside_a_foreign_module(tmp_path: Path) -> None:
    model = jiggle(nn.Sequential(nn.Conv2d(3, 16, 1), FusedCIEMA(16, 2, backend="reference")))
    x = torch.randn(2, 3, 6, 6)
    path = export_onnx(model, x, tmp_path / "s.onnx")
    with torch.no_grad():
        assert relative(run_file(path, x), model(x)) < 1e-5


def test_opset_is_the_one_asked_for(layer: FusedCIEMA, tmp_path: Path) -> None:
    path = export_onnx(layer, torch.zeros(1, 16, 6, 6), tmp_path / "o.onnx", opset=18)
    assert [(o.domain, o.version) for o in onnx.load(path).opset_import] == [("", 18)]


# ----------------------------------------------------------------------------- the caller's things


def test_model_is_untouched_and_evaluation_form_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = small_network(backend="auto").train()
    before, keys = copy.deepcopy(model.state_dict()), list(model.state_dict())
    example = torch.zeros(1, 3, SIZE, SIZE, requires_grad=True)
    set_backend("reference")
    with caplog.at_level(logging.INFO, logger="mobilesteelnet"):
        path = export_onnx(model, example, tmp_path / "t.onnx")
    assert "training mode" in caplog.text
    assert "largest relative error" in caplog.text
    assert model.training
    assert all(m.training for m in model.modules())
    assert model.ciema is not None
    assert model.ciema.backend == "auto"
    assert list(model.state_dict()) == keys
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    images = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        want = model.eval()(images)
    assert relative(run_file(path, images), want) < 1e-5


# -------------------------------------------------------------------------------------- refusals


def test_wrong_result_is_refused_and_the_old_file_kept(
    layer: FusedCIEMA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "old.onnx"
    path.write_bytes(b"old")
    trace = export._trace

    def wrong(module: nn.Module, *args: Any) -> Any:
        module = copy.deepcopy(module)
        module.final_fusion[1].bias.data.add_(0.5)  # type: ignore[index,union-attr]
        return trace(module, *args)

    monkeypatch.setattr(export, "_trace", wrong)
    with pytest.raises(ExportError, match=r"computes something else.*batch 1"):
        export_onnx(layer, torch.zeros(1, 16, 6, 6), path)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["old.onnx"]


def test_nan_does_not_pass(tmp_path: Path) -> None:
    layer = FusedMSFF((4,), 4).eval()
    layer.fusion_conv[0].weight.data.fill_(float("nan"))
    with pytest.raises(ExportError, match="nan"):
        export_onnx(layer, [torch.zeros(1, 4, 3, 3)], tmp_path / "n.onnx")
    assert not list(tmp_path.iterdir())


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum() > 0 else x - 1


class TwoOutputs(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, x + 1


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"cannot be exported: .*data-dependent") as refused:
        export_onnx(Branching(), torch.zeros(1, 1, 2, 2), tmp_path / "b.onnx")
    assert str(refused.value).isprintable()  # the exporter colours its steps
    with pytest.raises(TypeError, match="one tensor"):
        export_onnx(TwoOutputs(), torch.zeros(1, 1, 2, 2), tmp_path / "b.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("example", "kind", "message"),
    [
        (torch.zeros(1, 16, 6, 6, dtype=torch.float64), TypeError, "example has dtype"),
        (torch.zeros(1, 16, 6, 6, dtype=torch.int64), TypeError, "example has dtype"),
        (torch.zeros(16, 6, 6), ValueError, "example has shape"),
        (torch.zeros(0, 16, 6, 6), ValueError, "example has shape"),
        (torch.zeros(1, 8, 6, 6), ValueError, "8 channels"),
        ("picture.png", TypeError, "example must be"),
        ([], TypeError, "example must be"),
        ([1], TypeError, "example must hold tensors"),
        (np.zeros((1, 16, 6, 6), np.float32), TypeError, "example must be"),
    ],
    ids=["float64", "int64", "3-D", "empty", "channels", "text", "nothing", "numbers", "numpy"],
)
def test_wrong_example(
    layer: FusedCIEMA, example: Any, kind: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=message):
        export_onnx(layer, example, tmp_path / "e.onnx")
    assert not list(tmp_path.iterdir())


def test_foreign_kernel_complaint_names_the_example(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="example does not fit"):
        export_onnx(nn.Conv2d(3, 4, 1), torch.zeros(1, 5, 4, 4), tmp_path / "e.onnx")


@pytest.mark.parametrize("opset", [17, 1000, -1])
def test_unknown_opset(layer: FusedCIEMA, opset: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"opset={opset}"):
        export_onnx(layer, torch.zeros(1, 16, 6, 6), tmp_path / "e.onnx", opset=opset)


def test_wrong_types(layer: FusedCIEMA, tmp_path: Path) -> None:
    example = torch.zeros(1, 16, 6, 6)
    with pytest.raises(TypeError, match="opset"):
        export_onnx(layer, example, tmp_path / "e.onnx", opset="18")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="metadata"):
        export_onnx(
            layer,
            example,
            tmp_path / "e.onnx",
            metadata={"classes": 3},  # type: ignore[dict-item]
        )
    with pytest.raises(TypeError, match="model"):
        export_onnx("model", example, tmp_path / "e.onnx")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model: .* is torch.float16"):
        export_onnx(copy.deepcopy(layer).half(), example, tmp_path / "e.onnx")


def test_paths_that_cannot_be_written(layer: FusedCIEMA, tmp_path: Path) -> None:
    example = torch.zeros(1, 16, 6, 6)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="missing"):
        export_onnx(layer, example, tmp_path / "missing" / "e.onnx")
    with pytest.raises(NotADirectoryError, match="file"):
        export_onnx(layer, example, tmp_path / "file" / "e.onnx")
    with pytest.raises(IsADirectoryError):
        export_onnx(layer, example, tmp_path)


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_extra_is_named(
    layer: FusedCIEMA, missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib

    real = importlib.import_module

    def absent(name: str, package: str | None = None) -> Any:
        if name == missing:
            raise ImportError(name)
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(ImportError, match=rf'{missing} is missing: pip install "mobilesteelnet\['):
        export_onnx(layer, torch.zeros(1, 16, 6, 6), tmp_path / "e.onnx")
    assert not list(tmp_path.iterdir())


def test_without_check_onnxruntime_is_not_needed(
    layer: FusedCIEMA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def absent(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "onnxruntime":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    path = export_onnx(layer, torch.zeros(1, 16, 6, 6), tmp_path / "e.onnx", check=False)
    assert path.stat().st_size > 0
