"""FusedCIEMA and FusedMSFF as drop-ins: keys, exotic children, fuse, compile, export and DDP."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from stage_cases import DEVICES, PLACES, Place
from torch import nn
from torch.utils.checkpoint import checkpoint

import fused
from fused import BackendError, FusedCIEMA, FusedMSFF, ops
from fused.backends.reference.published import PublishedCIEMA, PublishedMSFF
from mobilesteelnet.model import MobileSteelNet


def pair(**arguments: object) -> tuple[PublishedCIEMA, FusedCIEMA]:
    """A published and a fused block of the same weights."""
    published = PublishedCIEMA(24, 4, 4, **arguments).double()
    block = FusedCIEMA(24, 4, 4, **arguments).double()
    block.load_state_dict(published.state_dict(), strict=True)
    return published, block


def same(block: nn.Module, published: nn.Module, x: torch.Tensor) -> None:
    """Outputs, gradients and buffers of both agree, in training and then in evaluation."""
    for training in (True, False):
        block.train(training), published.train(training)
        results = []
        for module in (block, published):
            module.zero_grad()
            leaf = x.clone().requires_grad_()
            out = module(leaf)
            (out * torch.linspace(-1, 1, out.numel()).to(out).view_as(out)).sum().backward()
            grads = [p.grad for p in module.parameters() if p.grad is not None]
            results.append([out, leaf.grad, *grads, *module.state_dict().values()])
        assert len(results[0]) == len(results[1])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got.double(), want.double(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("statistics", ["sequential", "pooled"])
def test_equals_the_published_form(statistics: str, device: str) -> None:
    published, block = (m.to(device) for m in pair(bn_statistics=statistics))
    assert block.modular_reason() is None
    same(block, published, torch.randn(3, 24, 5, 6).double().to(device))
    published.load_state_dict(block.state_dict(), strict=True)


def test_same_seed_gives_the_same_initial_weights() -> None:
    states = []
    for kind in (PublishedCIEMA, FusedCIEMA):
        torch.manual_seed(7)
        states.append(kind(32, 4).state_dict())
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_msff_equals_the_published_form(device: str) -> None:
    published = PublishedMSFF([4, 6, 8], 5).double().to(device)
    block = FusedMSFF([4, 6, 8], 5).double().to(device)
    block.load_state_dict(published.state_dict(), strict=True)
    sizes = ((4, 9, 4), (6, 5, 7), (8, 2, 2))
    maps = [torch.randn(2, c, s, t).double().to(device) for c, s, t in sizes]
    for training in (True, False):
        block.train(training), published.train(training)
        torch.testing.assert_close(block(maps), published(maps))
    for a, b in zip(block.buffers(), published.buffers(), strict=True):
        torch.testing.assert_close(a, b)


# ---------------------------------------------------------------------------- exotic children


def hook(block: nn.Module) -> None:
    block.conv3x3.register_forward_hook(lambda module, args, out: 2 * out)


def parametrise(block: nn.Module) -> None:
    torch.nn.utils.parametrizations.weight_norm(block.final_fusion[0])


def _no_affine(block: nn.Module) -> None:
    old = block.multi_scale_fusion[1]
    block.multi_scale_fusion[1] = nn.BatchNorm2d(old.num_features, affine=False).double()


def _no_tracking(block: nn.Module) -> None:
    net = block.cross_spatial_learning
    old = net.ms_reduce[1]
    net.ms_reduce[1] = nn.BatchNorm2d(old.num_features, track_running_stats=False).double()


def hook_on_a_container(block: nn.Module) -> None:
    block.cross_spatial_learning.register_forward_hook(lambda module, args, out: out + 1)


EXOTIC: dict[str, tuple[Callable[[nn.Module], None], str]] = {
    "hook": (hook, "conv3x3 has hooks"),
    "container hook": (hook_on_a_container, "cross_spatial_learning has hooks"),
    "parametrisation": (parametrise, r"final_fusion.0 is a Parametrized"),
    "affine": (_no_affine, "multi_scale_fusion.1 has affine=False"),
    "tracking": (_no_tracking, "ms_reduce.1 has track_running_stats=False"),
}


@pytest.mark.parametrize("exotic", EXOTIC)
def test_exotic_children_are_called_and_explain_says_so(exotic: str) -> None:
    change, reason = EXOTIC[exotic]
    published, block = pair()
    change(published), change(block)
    block.load_state_dict(published.state_dict())
    same(block, published, torch.randn(2, 24, 5, 4).double())
    text = str(fused.explain(block))
    assert "runs child by child, because" in text
    with pytest.raises(BackendError, match=reason):
        FusedCIEMA.forward(_with_backend(block, "cpu"), torch.randn(2, 24, 5, 4).double())


def _with_backend(block: FusedCIEMA, backend: str) -> FusedCIEMA:
    block = copy.deepcopy(block)
    block.backend = backend
    return block


def test_hooks_fire_once_a_call_of_the_published_form() -> None:
    block = FusedCIEMA(24, 4, 4)
    calls: list[int] = []
    block.cross_spatial_learning.channel_feat.register_forward_hook(lambda *a: calls.append(1))
    block(torch.randn(2, 24, 4, 4))
    assert len(calls) == 2 * 4


def test_sync_batchnorm_children_are_called() -> None:
    published, block = pair()
    block = nn.SyncBatchNorm.convert_sync_batchnorm(block)
    assert "SyncBatchNorm" in block.modular_reason()
    x = torch.randn(2, 24, 5, 4).double()
    torch.testing.assert_close(block.eval()(x), published.eval()(x))


def test_frozen_batch_norms_train_the_rest() -> None:
    published, block = pair()
    for module in (published, block):
        module.train()
        for child in module.modules():
            if isinstance(child, nn.BatchNorm2d):
                child.eval()
    assert block.modular_reason() is None
    x = torch.randn(2, 24, 5, 4).double()
    torch.testing.assert_close(block(x), published(x))
    block.final_fusion[1].train(), published.final_fusion[1].train()
    assert "some batch norms are in training mode" in block.modular_reason()
    torch.testing.assert_close(block(x), published(x))


# ------------------------------------------------------------------ what PyTorch does to modules


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("training", [False, True])
def test_compile_fullgraph_without_recompiles_over_batch_sizes(
    training: bool, backend: str | None, device: str
) -> None:
    torch._dynamo.reset()
    block = FusedCIEMA(16, 4, backend=backend).train(training).to(device)
    eager = copy.deepcopy(block)
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    # torch's own convolution guards on a batch below 16, so these stay on one side of it.
    for index, batch in enumerate((19, 16, 23)):
        x = torch.randn(batch, 16, 4, 3).to(device).requires_grad_(training)
        twin = x.detach().clone().requires_grad_(training)
        with torch._dynamo.config.patch(error_on_recompile=index > 0):
            got = compiled(x)
        want = eager(twin)
        torch.testing.assert_close(got, want)
        if training:
            got.sum().backward(), want.sum().backward()
            torch.testing.assert_close(x.grad, twin.grad, rtol=1e-4, atol=1e-5)
    for key, value in eager.state_dict().items():
        torch.testing.assert_close(block.state_dict()[key], value, msg=key)


@pytest.mark.parametrize("device", DEVICES)
def test_compile_of_the_network_with_inductor(device: str) -> None:
    torch._dynamo.reset()
    model = MobileSteelNet(4, width=0.125).eval().to(device)
    compiled = torch.compile(model, fullgraph=True)
    images = torch.randn(2, 3, 64, 64).to(device)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_export_with_a_dynamic_batch(backend: str | None, device: str) -> None:
    model = MobileSteelNet(4, width=0.125, backend=backend).eval().to(device)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(
        *(model, (torch.randn(2, 3, 64, 64).to(device),)), dynamic_shapes={"images": {0: batch}}
    )
    images = torch.randn(3, 3, 64, 64).to(device)
    torch.testing.assert_close(program.module()(images), model(images), rtol=1e-4, atol=1e-5)
    ops = {str(node.target) for node in program.graph.nodes}
    assert any(name.startswith("ciema.") for name in ops) == (backend is None)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_a_training_program_can_be_stored(backend: str | None, training: bool) -> None:
    block, x = FusedCIEMA(16, 4, backend=backend).train(training), torch.randn(2, 16, 6, 5)
    stored = io.BytesIO()
    shapes = ({0: torch.export.Dim("batch", min=2, max=64)},)
    torch.export.save(torch.export.export(block, (x,), dynamic_shapes=shapes), stored)
    stored.seek(0)
    loaded = torch.export.load(stored).module()
    torch.testing.assert_close(loaded(x), block(x), rtol=1e-4, atol=1e-5)
    buffers = dict(loaded.named_buffers())
    for name, buffer in block.named_buffers():
        torch.testing.assert_close(buffers[name], buffer)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_whole_modules_in_another_dtype(dtype: torch.dtype, device: str) -> None:
    block = FusedCIEMA(24, 4, 4, device=device, dtype=dtype)
    out = block(torch.randn(2, 24, 5, 6, device=device, dtype=dtype))
    out.sum().backward()
    assert out.dtype == dtype
    assert {p.grad.dtype for p in block.parameters()} == {dtype}


def test_deepcopy_and_pickle() -> None:
    block = FusedCIEMA(24, 4, 4, bn_statistics="pooled", backend="reference").eval()
    x = torch.randn(2, 24, 5, 6)
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(twin(x), block(x))
        assert repr(twin) == repr(block)
        assert twin.final_fusion[0].weight is not block.final_fusion[0].weight
    buffer = io.BytesIO()
    torch.save(block.state_dict(), buffer)
    buffer.seek(0)
    block.load_state_dict(torch.load(buffer, weights_only=True), strict=True)


def test_meta_device_construction_and_forward() -> None:
    with torch.device("meta"):
        block = FusedCIEMA(1024)
    assert {p.device.type for p in block.parameters()} == {"meta"}
    assert FusedCIEMA(64, device="meta").final_fusion[0].weight.is_meta
    out = block(torch.empty(2, 1024, 7, 7, device="meta"))
    assert out.shape == (2, 1024, 7, 7)
    real = FusedCIEMA(64, 4, device="meta").to_empty(device="cpu")
    real.load_state_dict(FusedCIEMA(64, 4).state_dict())
    assert real.eval()(torch.randn(1, 64, 3, 3)).isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_channels_last_in_and_out(device: str) -> None:
    for backend in (None, "reference"):
        block = FusedCIEMA(24, 4, 4, backend=backend, device=device)
        plain = torch.randn(2, 24, 5, 6).to(device)
        x = plain.contiguous(memory_format=torch.channels_last).requires_grad_()
        block = copy.deepcopy(block).to(memory_format=torch.channels_last)
        out = block(x)
        assert out.is_contiguous(memory_format=torch.channels_last)
        out.sum().backward()
        assert x.grad.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(block.eval()(x), block(plain), rtol=1e-4, atol=1e-5)
    msff = FusedMSFF([4, 6], device=device)
    maps = [torch.randn(2, 4, 6, 6).to(device), torch.randn(2, 6, 3, 3).to(device)]
    maps = [m.contiguous(memory_format=torch.channels_last).requires_grad_() for m in maps]
    out = msff(maps)
    out.sum().backward()
    for t in (out, *(m.grad for m in maps)):
        assert t.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("device", DEVICES)
def test_activation_checkpointing(device: str) -> None:
    block = FusedCIEMA(24, 4, 4).to(device)
    twin = copy.deepcopy(block)
    x = torch.randn(2, 24, 5, 6).to(device)
    for module, run in ((block, block), (twin, lambda v: checkpoint(twin, v, use_reentrant=False))):
        module.zero_grad()
        run(x).square().sum().backward()
    for a, b in zip(block.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("device", DEVICES)
def test_spatial_gate_leaves_buffers_alone(device: str) -> None:
    block = FusedCIEMA(24, 4, 4).to(device)
    before = copy.deepcopy(block.state_dict())
    gate = block.spatial_gate(torch.randn(2, 24, 5, 6).to(device))
    assert gate.shape == (2, 4, 5, 6)
    assert bool((gate > 0).all())
    assert bool((gate < 1).all())
    assert all(torch.equal(v, before[k]) for k, v in block.state_dict().items())


@pytest.mark.parametrize("form", ["sequential", "pooled"])
def test_spatial_gate_of_called_children_leaves_buffers_alone(form: str) -> None:
    block = FusedCIEMA(24, 4, 4, bn_statistics=form)
    twin, x = copy.deepcopy(block), torch.randn(2, 24, 5, 6)
    block.conv1x1.register_forward_hook(lambda *_: None)
    before = copy.deepcopy(block.state_dict())
    out = block.cross_spatial_learning.ms_reduce[1](torch.randn(2, 6, 3, 3))
    before |= {k: v.clone() for k, v in block.state_dict().items() if "ms_reduce.1." in k}
    gate = block.spatial_gate(x)
    torch.testing.assert_close(gate, twin.spatial_gate(x))
    assert all(torch.equal(v, before[k]) for k, v in block.state_dict().items())
    (out.sum() + gate.sum()).backward()  # what autograd saved is as it was


def test_spatial_gate_in_a_thread_takes_nothing_from_training() -> None:
    block, x = FusedCIEMA(16, 4), torch.randn(2, 16, 4, 3)
    block.conv3x3.register_forward_hook(lambda *_: None)
    buffers, stopped = list(block.buffers()), threading.Event()

    def watch() -> None:
        while not stopped.is_set():
            block.spatial_gate(x)

    watchers = [threading.Thread(target=watch) for _ in range(2)]
    for watcher in watchers:
        watcher.start()
    try:
        for _ in range(30):
            block(x)
    finally:
        stopped.set()
        for watcher in watchers:
            watcher.join()
    norm: Any = block.cross_spatial_learning.ms_reduce[1]
    assert norm.num_batches_tracked == 30 * 2 * 4
    assert all(a is b for a, b in zip(block.buffers(), buffers, strict=True))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("kind", ["ciema", "msff"])
def test_a_trace_passes_its_own_check(kind: str, backend: str | None) -> None:
    block: nn.Module = FusedCIEMA(16, 4, backend=backend)
    x: Any = torch.randn(2, 16, 4, 3)
    if kind == "msff":
        block, x = FusedMSFF([4, 8], backend=backend), [torch.randn(2, c, 4, 3) for c in (4, 8)]
    block.eval()
    traced = torch.jit.trace(block, (x,))  # with gradients, and checked without
    torch.testing.assert_close(traced(x), block(x))
    assert traced(x).requires_grad


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_equal_maxima_give_the_gradient_to_the_first(place: Place) -> None:
    published = PublishedCIEMA(16, 4, 4).channel_interaction
    x = torch.randint(0, 2, (2, 16, 4, 3)).float()
    weights = (published.fc[0].weight, published.fc[2].weight, published.channel_interaction.weight)
    grads = []
    names = [place.backend] if place.backend else ["cpu", "reference"]
    for name in ("published", *names):
        device = "cpu" if name == "published" else place.device
        leaf = x.detach().clone().to(device).requires_grad_()
        if name == "published":
            e = published(leaf)
        else:
            given = (weight.detach().to(device) for weight in weights)
            e = ops.channel_interaction(leaf, *given, backend=name)[0]
        e.square().sum().backward()
        grads.append(leaf.grad.cpu())
    for grad in grads[1:]:
        torch.testing.assert_close(grad, grads[0], rtol=1e-4, atol=1e-4)


def test_msff_takes_any_iterable() -> None:
    maps = [torch.randn(2, 3, 4, 4), torch.randn(2, 5, 2, 2)]
    block = FusedMSFF([3, 5], 4).eval()
    frozen = fused.optimize_for_inference(block)
    for module in (block, frozen):
        torch.testing.assert_close(module(m for m in maps), module(maps))
        with pytest.raises(ValueError, match="features"):
            module(iter(()))


def _train_in_a_process(rank: int, path: str, results: mp.SimpleQueue) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    torch.manual_seed(0)
    block = FusedCIEMA(16, 4)
    model = nn.parallel.DistributedDataParallel(block)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(2):
        optimiser.zero_grad()
        model(torch.randn(2, 16, 4, 4, generator=generator)).square().mean().backward()
        optimiser.step()
    results.put((rank, [p.detach().double().sum().item() for p in block.parameters()]))
    dist.destroy_process_group()


def test_ddp_over_gloo_with_two_processes(tmp_path) -> None:
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    mp.spawn(_train_in_a_process, (str(tmp_path / "rendezvous"), results), nprocs=2)
    sums = dict(results.get() for _ in range(2))
    assert sums[0] == sums[1]
