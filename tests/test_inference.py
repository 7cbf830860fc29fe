"""optimize_for_inference: the frozen form gives the unfrozen one's results and refuses the rest."""

from __future__ import annotations

import copy
import io
import logging
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import shared_path
from safetensors.torch import load, save
from stage_cases import DEVICES, error, tolerance
from test_golden import CASES, build, golden_weights
from torch import nn

import fused
from fused import FrozenError, FusedCIEMA, FusedMSFF, optimize_for_inference
from fused.backends.reference.published import PublishedCIEMA, PublishedMSFF
from fused.frozen import FrozenCIEMA, FrozenMSFF
from mobilesteelnet.frozen import FrozenMobileSteelNet
from mobilesteelnet.model import MobileSteelNet

NARROW = 0.125
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """These networks are too small to share; a second thread would mostly wait for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def calibrated(module: nn.Module) -> nn.Module:
    """In evaluation mode, with batch norms that are far from the identity."""
    for child in module.modules():
        if isinstance(child, (nn.BatchNorm2d, nn.GroupNorm)):
            nn.init.uniform_(child.weight, 0.5, 1.5)
            nn.init.normal_(child.bias, 0, 0.3)
        if isinstance(child, nn.BatchNorm2d):
            child.running_mean.normal_(0, 0.3)
            child.running_var.uniform_(0.5, 2)
    return module.eval()


def network(**options: Any) -> MobileSteelNet:
    return calibrated(MobileSteelNet(**{"width": NARROW, **options}))


def ciema() -> FusedCIEMA:
    return calibrated(FusedCIEMA(24, 4, 4))


def in_float64(module: nn.Module, x: Any) -> torch.Tensor:
    twin = copy.deepcopy(module).double()
    for block in twin.modules():
        if isinstance(block, (FusedCIEMA, FusedMSFF)):
            block.backend = "reference"
    with torch.no_grad():
        return twin([m.double() for m in x] if isinstance(x, list) else x.double())


def agrees(module: nn.Module, x: Any, dtype: torch.dtype | None = None) -> nn.Module:
    """The frozen form of `module`, after its result for x was compared with float64."""
    frozen = optimize_for_inference(module, dtype)
    got = frozen(x)
    first = x[0] if isinstance(x, list) else x
    assert got.dtype == first.dtype
    allowed = tolerance(dtype or first.dtype)[0]
    assert error(got, in_float64(module, x)) <= allowed
    return frozen


# ---------------------------------------------------------------------------------- same results


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(1, 64, 64), (3, 57, 63), (1, 7, 30), (2, 1, 1)])
@pytest.mark.parametrize("activation", [None, "relu", "relu-output"])
def test_network(activation: str | None, size: tuple[int, ...], layout: Any) -> None:
    batch, height, width = size
    images = torch.randn(batch, 3, height, width).contiguous(memory_format=layout)
    frozen = agrees(network(activation=activation), images)
    assert type(frozen) is FrozenMobileSteelNet
    assert frozen.config["activation"] == activation


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64, *HALVES])
@pytest.mark.parametrize("width", [NARROW, 0.3])
def test_network_dtypes(width: float, dtype: torch.dtype | None) -> None:
    agrees(network(width=width), torch.randn(2, 3, 45, 64), dtype)


@pytest.mark.parametrize("options", [{"attention": "none"}, {"fusion": "none"}, {"in_channels": 1}])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_network_forms(dtype: torch.dtype | None, options: dict[str, Any]) -> None:
    images = torch.randn(2, options.get("in_channels", 3), 40, 48)
    agrees(network(**options), images, dtype)
    both = {"attention": "none", "fusion": "none", **options}
    agrees(network(**both), images, dtype)


def test_a_strided_and_half_input_comes_back_in_its_dtype() -> None:
    model = network()
    images = torch.randn(2, 3, 64, 96)[:, :, ::2, 3:60:2]
    frozen = agrees(model, images)
    for dtype in (*HALVES, torch.float64):
        cast = images.to(dtype)
        got = frozen(cast)
        assert got.dtype == dtype
        want = in_float64(model, cast)
        assert error(got, want) <= tolerance(torch.float32 if dtype == torch.float64 else dtype)[0]


@pytest.mark.parametrize("dtype", HALVES)
def test_a_half_model_is_kept_or_converted(dtype: torch.dtype) -> None:
    model = network().to(dtype)
    images = torch.randn(2, 3, 32, 32)
    want = in_float64(model, images)
    assert error(optimize_for_inference(model)(images), want) <= tolerance(dtype)[0]
    other = HALVES[HALVES[0] == dtype]
    for asked, allowed in ((torch.float32, 1e-5), (torch.float64, 1e-6), (other, 2e-2)):
        assert error(optimize_for_inference(model, asked)(images), want) <= allowed


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [None, torch.float64, *HALVES])
@pytest.mark.parametrize("device", DEVICES)
def test_ciema(device: str, dtype: torch.dtype | None, layout: Any) -> None:
    x = torch.randn(2, 24, 9, 7, device=device).contiguous(memory_format=layout)
    block = ciema().to(device)
    frozen = agrees(block, x, dtype)
    assert type(frozen) is FrozenCIEMA
    assert frozen(x).is_contiguous(memory_format=layout)
    with torch.no_grad():
        gate = copy.deepcopy(block).double().spatial_gate(x.double())
        allowed = tolerance(dtype or torch.float32)[0]
        assert error(frozen.spatial_gate(x), gate) <= allowed
        assert error(frozen.mean(x), in_float64(block, x).mean((2, 3))) <= allowed


@pytest.mark.parametrize("dtype", [None, torch.float64, *HALVES])
@pytest.mark.parametrize("device", DEVICES)
def test_msff(device: str, dtype: torch.dtype | None) -> None:
    sizes = ((4, 9, 7), (6, 5, 7), (8, 2, 2))
    maps = [torch.randn(2, *size, device=device) for size in sizes]
    frozen = agrees(calibrated(FusedMSFF([4, 6, 8], 5)).to(device), maps, dtype)
    assert type(frozen) is FrozenMSFF


def test_plain_torch_where_there_is_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = fused.backends.cpu.LIBRARY.__class__("cpu", None, "not there")
    monkeypatch.setattr(fused.backends.cpu, "LIBRARY", broken)
    model, images = network(activation="relu"), torch.randn(2, 3, 45, 64)
    for dtype in (None, torch.bfloat16):
        frozen = agrees(model, images, dtype)
    assert "not there" in str(fused.explain(frozen))


def test_the_reference_is_used_when_it_is_asked_for() -> None:
    frozen = agrees(network(backend="reference"), torch.randn(2, 3, 45, 64))
    assert set(fused.explain(frozen).chosen().values()) == {"reference"}
    assert type(frozen._plan().stem).__name__ == "Stem"


@pytest.mark.skipif(not CASES, reason="shared/golden is not beside the project")
@pytest.mark.parametrize("name", [case["file"] for case in CASES])
def test_golden(name: str) -> None:
    """The published modules' numbers, for inputs and weights that anyone can rebuild."""
    (case,) = (c for c in CASES if c["file"] == name)
    weights = golden_weights()
    module = build(case, "auto").eval()
    module.load_state_dict(weights.fill(module.state_dict(), case["seed"]), strict=True)
    inputs = [weights.draw(s, case["seed"] + 1 + i) for i, s in enumerate(case["inputs"])]
    inputs = [x.float() for x in inputs]
    from safetensors.torch import load_file

    want = load_file(shared_path("golden", case["file"]))
    key = "eval.out" if "eval.out" in want else "eval.out#every97"
    for dtype in (torch.float32, torch.bfloat16):
        out = optimize_for_inference(module, dtype)(inputs if case["kind"] == "msff" else inputs[0])
        got = out.flatten()[::97] if key.endswith("97") else out
        assert error(got.reshape(want[key].shape), want[key]) <= tolerance(dtype)[0]


# ------------------------------------------------------------------------------ models around it


class Wrapped(nn.Module):
    """Somebody's model: own layers, a block twice, a list input."""

    def __init__(self, kinds: tuple[type, type]) -> None:
        super().__init__()
        ciema, msff = kinds
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.fusion = msff([8, 3], 8)
        self.attention = nn.ModuleList([ciema(8, 2, 4)])
        self.again = self.attention[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.attention[0](self.fusion([self.stem(x), x[:, :, ::2, ::2]]))
        return self.again(y).mean((2, 3))


@pytest.mark.parametrize("kinds", [(FusedCIEMA, FusedMSFF), (PublishedCIEMA, PublishedMSFF)])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_blocks_inside_any_model(dtype: torch.dtype | None, kinds: tuple[type, type]) -> None:
    model = calibrated(Wrapped(kinds))
    frozen = agrees(model, torch.randn(2, 3, 12, 10), dtype)
    assert type(frozen.again) is FrozenCIEMA
    assert frozen.again is frozen.attention[0]
    assert type(frozen.fusion) is FrozenMSFF
    assert list(frozen.state_dict()) == list(model.state_dict())
    for module in (frozen, frozen.stem, frozen.attention):
        with pytest.raises(FrozenError, match="cannot be trained"):
            module.train()
        with pytest.raises(FrozenError, match="cannot be trained"):
            module.requires_grad_()
    assert not any(module.training for module in frozen.modules())
    assert frozen.eval() is frozen
    assert type(model.again) is kinds[0]


def test_a_network_inside_a_model() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x).softmax(1)

    frozen = agrees(Holder().eval(), torch.randn(1, 3, 32, 32))
    assert type(frozen.net) is FrozenMobileSteelNet


def _hook_inside(model: Any) -> None:
    model.ciema.conv3x3.register_forward_hook(lambda module, args, out: 2 * out)


def _hook_on_the_block(model: Any) -> None:
    model.ciema.register_forward_hook(lambda module, args, out: out + 1)


def _hook_in_the_backbone(model: Any) -> None:
    model.stage1[0].pointwise.register_forward_hook(lambda module, args, out: 2 * out)


def _sync_batch_norm(model: Any) -> None:
    model.initial_conv[1] = nn.SyncBatchNorm.convert_sync_batchnorm(model.initial_conv[1])


def _overridden(model: Any) -> None:
    class Doubled(FusedCIEMA):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model.ciema.__class__ = Doubled


EXOTIC: dict[str, tuple[Callable[[Any], None], str, tuple[type, type]]] = {
    "hook inside": (_hook_inside, "conv3x3 has hooks", (FusedCIEMA, FrozenMSFF)),
    "hook on the block": (_hook_on_the_block, "ciema has hooks", (FusedCIEMA, FrozenMSFF)),
    "hook in the backbone": (_hook_in_the_backbone, "has hooks", (FrozenCIEMA, FrozenMSFF)),
    "SyncBatchNorm": (_sync_batch_norm, "SyncBatchNorm", (FrozenCIEMA, FrozenMSFF)),
    "subclass": (_overridden, "is a Doubled", (FusedCIEMA, FrozenMSFF)),
}


@pytest.mark.parametrize("name", EXOTIC)
def test_what_has_to_be_called_stays_and_is_said(name: str, caplog: Any) -> None:
    change, reason, kinds = EXOTIC[name]
    model = network()
    change(model)
    with caplog.at_level(logging.WARNING, "fused"):
        frozen = agrees(model, torch.randn(1, 3, 32, 32))
    assert reason in caplog.text
    assert isinstance(frozen.ciema, kinds[0])
    assert isinstance(frozen.msff, kinds[1])
    with pytest.raises(FrozenError):
        frozen.train()


def test_explain_tells_of_the_frozen_form() -> None:
    frozen = optimize_for_inference(network())
    lines = [line for line in fused.explain(frozen).lines if line.chosen]
    assert len(lines) == 5
    assert all("frozen" in line.reason for line in lines)


# -------------------------------------------------------------------------------------- refusals


def test_what_cannot_be_frozen_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model is in training mode.*model\.eval\(\)"):
        optimize_for_inference(network().train())
    model = network()
    model.ciema.gn.train()
    with pytest.raises(ValueError, match=r"model\.ciema\.gn is in training mode"):
        optimize_for_inference(model)
    with pytest.raises(ValueError, match="holds no CIEMA or MSFF block"):
        optimize_for_inference(nn.Conv2d(1, 1, 1).eval())
    block = ciema()
    block.conv3x3.register_forward_hook(lambda *a: None)
    with pytest.raises(ValueError, match="conv3x3 has hooks"):
        optimize_for_inference(block)
    with pytest.raises(ValueError, match="frozen already"):
        optimize_for_inference(optimize_for_inference(ciema()))
    with pytest.raises(TypeError, match=r"dtype=torch\.int8"):
        optimize_for_inference(ciema(), torch.int8)
    with pytest.raises(TypeError, match="model is a str"):
        optimize_for_inference("model")  # type: ignore[arg-type]


def test_training_gradients_and_conversion_are_refused() -> None:
    frozen = optimize_for_inference(network())
    images = torch.randn(1, 3, 32, 32)
    for call in (
        frozen.train,
        frozen.ciema.train,
        frozen.requires_grad_,
        lambda: frozen(images.clone().requires_grad_()),
        lambda: frozen.ciema(torch.zeros(1, 128, 4, 4, requires_grad=True)),
        lambda: frozen.msff([torch.zeros(1, 1, 1, 1, requires_grad=True)]),
    ):
        with pytest.raises(FrozenError, match="cannot be trained or differentiated"):
            call()
    for call in (frozen.half, lambda: frozen.to(torch.bfloat16), frozen.double):
        with pytest.raises(FrozenError, match="dtype="):
            call()
    assert not frozen(images).requires_grad
    with torch.no_grad():
        frozen(images.clone().requires_grad_())
    frozen.fc.weight.requires_grad = True
    with pytest.raises(FrozenError, match="a parameter requires grad"):
        frozen(images)


def test_wrong_inputs_are_refused_as_before() -> None:
    model, frozen = network(), optimize_for_inference(network())
    for images in (torch.zeros(1, 1, 8, 8), torch.zeros(3, 8, 8)):
        for one in (model, frozen):
            with pytest.raises(ValueError, match="images have shape"):
                one(images)
    with pytest.raises(TypeError, match=r"images has dtype torch\.uint8"):
        frozen(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    block = optimize_for_inference(ciema())
    with pytest.raises(ValueError, match="x has 3 channels"):
        block(torch.zeros(1, 3, 4, 4))
    with pytest.raises(TypeError, match="must be a tensor"):
        block(None)
    with pytest.raises(TypeError, match="list of maps"):
        optimize_for_inference(calibrated(FusedMSFF([3])))(torch.zeros(1, 3, 4, 4))


def test_export_is_done_from_the_unfrozen_model() -> None:
    frozen = optimize_for_inference(network())
    with pytest.raises(Exception, match="export the model it was made from"):
        torch.export.export(frozen, (torch.randn(1, 3, 32, 32),))


def test_autocast_does_not_reach_inside() -> None:
    images = torch.randn(1, 3, 32, 32)
    for backend in (None, "reference"):
        model = network(backend=backend)
        frozen = optimize_for_inference(model)
        want = frozen(images)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(frozen(images), want)


def test_made_and_called_in_inference_mode() -> None:
    model, images = network(), torch.randn(1, 3, 32, 32)
    want = optimize_for_inference(model)(images)
    with torch.inference_mode():
        frozen = optimize_for_inference(model)
        assert torch.equal(frozen(images), want)
    assert torch.equal(frozen(images), want)
    assert torch.equal(copy.deepcopy(frozen)(images), want)


def test_compile_leaves_it_alone() -> None:
    frozen, images = optimize_for_inference(network()), torch.randn(1, 3, 32, 32)
    compiled = torch.compile(lambda x: frozen(x) + 1, backend="eager")
    torch.testing.assert_close(compiled(images), frozen(images) + 1)


# -------------------------------------------------------------------------- weights that change


def test_the_frozen_copy_does_not_follow_the_model_and_loads_other_weights() -> None:
    images = torch.randn(1, 3, 32, 32)
    model, other = network(), network()
    frozen = optimize_for_inference(model, torch.bfloat16)
    before = frozen(images)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    assert torch.equal(frozen(images), before)

    want = optimize_for_inference(other, torch.bfloat16)(images)
    assert not torch.equal(want, before)
    for assign in (False, True):
        again = copy.deepcopy(frozen)
        again.load_state_dict(other.state_dict(), assign=assign)
        assert torch.equal(again(images), want)
    with torch.no_grad():  # a buffer alone
        frozen.stage2[1].bn.running_mean.add_(1)
    assert not torch.equal(frozen(images), before)


def test_the_unfrozen_model_never_uses_old_weights() -> None:
    """Every parameter and buffer counts in the call after it changed, also through `.data`."""
    block, x = ciema(), torch.randn(2, 24, 9, 7)
    with torch.no_grad():
        block(x)
        for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            before = block(x)
            tensor.data.mul_(1.5).add_(0.1)
            got = block(x)
            assert not torch.equal(got, before), name
            assert error(got, in_float64(block, x)) <= 1e-5, name


def test_saving_and_copying() -> None:
    images, model = torch.randn(2, 3, 33, 40), network()
    frozen = optimize_for_inference(model)
    want = frozen(images)
    for again in (copy.deepcopy(frozen), copy.copy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert torch.equal(again(images), want)
    again = copy.deepcopy(frozen)
    assert again.stage1.eval() is again.stage1
    assert again.stage1 is not frozen.stage1
    stream = io.BytesIO()
    torch.save(frozen.state_dict(), stream)
    stream.seek(0)
    for state in (torch.load(stream, weights_only=True), load(save(frozen.state_dict()))):
        fresh = optimize_for_inference(network())
        fresh.load_state_dict(state, strict=True)
        assert torch.equal(fresh(images), want)
        model.load_state_dict(state, strict=True)
    stream = io.BytesIO()
    torch.save(frozen, stream)
    stream.seek(0)
    assert torch.equal(torch.load(stream, weights_only=False)(images), want)


def test_a_pickle_holds_no_packed_weights() -> None:
    frozen = optimize_for_inference(network())
    own = sum(t.numel() * t.element_size() for t in frozen.state_dict().values())
    assert len(pickle.dumps(frozen)) < 1.5 * own + 100_000


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_two_threads_at_once_give_the_same_bits(dtype: torch.dtype | None) -> None:
    frozen = optimize_for_inference(network(), dtype)
    pictures = [torch.randn(1, 3, 64, 64) for _ in range(2)]
    want = [frozen(x) for x in pictures]
    fresh = pickle.loads(pickle.dumps(frozen))  # without a plan: the threads make it
    wrong: list[int] = []
    start = threading.Barrier(2)

    def work(index: int) -> None:
        start.wait()
        for _ in range(20):
            if not torch.equal(fresh(pictures[index]), want[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_bits_do_not_depend_on_threads_or_the_batch(dtype: torch.dtype | None) -> None:
    frozen, images = optimize_for_inference(network(), dtype), torch.randn(3, 3, 61, 64)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(frozen.backbone(images))
    finally:
        torch.set_num_threads(before)
    alone = [frozen.backbone(images[i : i + 1]) for i in range(3)]
    for stage, want in enumerate(results[0]):
        assert all(torch.equal(other[stage], want) for other in results)
        assert torch.equal(torch.cat([maps[stage] for maps in alone]), want)
