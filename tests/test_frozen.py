"""Frozen models refuse what they cannot do, and follow the weights that they are given."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from frozen_cases import calibrated, ciema, in_float64, network
from safetensors.torch import load, save
from stage_cases import error
from torch import nn
from torch.func import functional_call

import fused
from fused import FrozenError, FusedMSFF, optimize_for_inference

pytestmark = pytest.mark.usefixtures("one_thread")

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


def test_the_frozen_blocks_take_what_the_unfrozen_ones_take_and_refuse_gradients() -> None:
    unfrozen = calibrated(FusedMSFF([24, 3], 24))
    msff, block = optimize_for_inference(unfrozen), optimize_for_inference(ciema())
    maps = [torch.randn(1, 24, 4, 4), torch.randn(1, 3, 2, 2)]
    want, known = unfrozen.with_statistics(maps)
    out, statistics = msff.with_statistics(maps)
    assert error(out, want) < 1e-5
    assert not out.requires_grad
    assert torch.equal(block.interact(out, statistics), block.interact(out))
    assert torch.equal(block.interact(out, known), block.interact(out))
    maps[1].requires_grad_()
    with pytest.raises(FrozenError, match="an input requires grad"):
        msff.with_statistics(maps)
    with pytest.raises(FrozenError, match="an input requires grad"):
        msff.with_statistics(iter(maps))
    for call in (block, block.interact, block.spatial_gate):
        with pytest.raises(FrozenError, match="an input has a tangent"):
            torch.func.jvp(call, (out,), (out,))


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


def test_a_refused_conversion_leaves_the_whole_model_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 24, 3), nn.Sequential(ciema(), nn.ReLU()), nn.LSTM(3, 3))
    frozen = optimize_for_inference(model.eval())
    images = torch.randn(1, 3, 8, 8)
    want = frozen[:2](images)
    for one in (frozen, copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        for call in (one.half, one.double, lambda one=one: one.to(torch.bfloat16)):
            with pytest.raises(FrozenError, match="cannot change its dtype"):
                call()
            assert {p.dtype for p in one.parameters()} == {torch.float32}
        assert one.to("cpu", memory_format=torch.channels_last) is one
        assert error(one[:2](images), want) < 1e-5
    assert frozen[0].half().weight.dtype == torch.float16


def test_export_is_done_from_the_unfrozen_model() -> None:
    frozen = optimize_for_inference(network())
    with pytest.raises(Exception, match="export the model it was made from"):
        torch.export.export(frozen, (torch.randn(1, 3, 32, 32),))


def test_a_refused_export_leaves_the_copy_as_it_was() -> None:
    frozen, images = optimize_for_inference(network()), torch.randn(1, 3, 32, 32)
    want = frozen(images)
    for one in (frozen, frozen.ciema):
        with pytest.raises(FrozenError, match="cannot be exported"):
            torch.export.export(one, (torch.randn(1, 1024, 4, 4) if one is not frozen else images,))
    assert torch.equal(frozen(images), want)
    frozen.ciema.conv3x3.weight.mul_(2)
    assert not torch.equal(frozen(images), want)


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


@pytest.mark.parametrize("freeze", [optimize_for_inference, lambda model: model.eval()])
def test_nothing_keeps_the_fused_map_once_channels_have_interacted(
    monkeypatch: pytest.MonkeyPatch, freeze: Callable[[Any], Any]
) -> None:
    """An eighth of the network's peak memory."""
    frozen, seen = freeze(network()), []
    interact, mean_after = frozen.ciema.interact, frozen.ciema.mean_after

    def watched(x: torch.Tensor, *statistics: Any) -> torch.Tensor:
        seen.append(weakref.ref(x))
        return interact(x, *statistics)

    def checked(e: torch.Tensor) -> torch.Tensor:
        assert seen[0]() is None
        return mean_after(e)

    monkeypatch.setattr(frozen.ciema, "interact", watched)
    monkeypatch.setattr(frozen.ciema, "mean_after", checked)
    with torch.no_grad():
        frozen(torch.randn(1, 3, 64, 64))
    assert len(seen) == 1


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


@pytest.mark.parametrize("assign", [False, True])
def test_what_was_frozen_in_inference_mode_follows_its_weights(assign: bool) -> None:
    model, other, images = network(), network(), torch.randn(1, 3, 32, 32)
    want = optimize_for_inference(other)(images)
    with torch.inference_mode():
        made_inside = optimize_for_inference(network().to(torch.float64), torch.float32)
        states = [copy.deepcopy(other.state_dict()), other.state_dict()]
        frozen = optimize_for_inference(model)
        assert not any(t.is_inference() for t in (*frozen.parameters(), *frozen.buffers()))
        for state in states:  # assigned tensors of inference mode, and then written to
            for one in (frozen, made_inside):
                assert not torch.equal(one(images), want)
                one.load_state_dict(copy.deepcopy(state), assign=assign)
                assert torch.equal(one(images), want)
                one.load_state_dict(network().state_dict())
        before = frozen(images)
        frozen.ciema.conv3x3.weight.mul_(2)
        assert assign or not torch.equal(frozen(images), before)


def test_a_replaced_child_counts() -> None:
    block, x = ciema(), torch.randn(2, 24, 9, 7)
    frozen, other = optimize_for_inference(block), copy.deepcopy(block.conv3x3)
    before = frozen(x)
    nn.init.normal_(other.weight)
    block.conv3x3, frozen.conv3x3 = other, copy.deepcopy(other).requires_grad_(False)
    got = frozen(x)
    assert not torch.equal(got, before)
    assert error(got, in_float64(block, x)) <= 1e-5
    frozen.final_fusion[2] = nn.Tanh()
    with pytest.raises(FrozenError, match=r"final_fusion\.2 is a Tanh, which weights packed once"):
        frozen(x)


def test_another_eps_counts() -> None:
    block, x = ciema(), torch.randn(2, 24, 9, 7)
    frozen = optimize_for_inference(block)
    before = frozen(x)
    for module in (*block.modules(), *frozen.modules()):
        if hasattr(module, "eps"):
            module.eps = 0.5
    got = frozen(x)
    assert error(got, before) > 1e-3
    assert error(got, in_float64(block, x)) <= 1e-5


@pytest.mark.parametrize(
    "name", ["ciema.conv3x3", "ciema.final_fusion", "ciema", "msff.fusion_conv.1", "stage1.0.bn"]
)
def test_hooks_on_children_are_refused_until_they_are_gone(name: str) -> None:
    frozen, images = optimize_for_inference(network()), torch.randn(1, 3, 32, 32)
    want = frozen(images)
    hook = frozen.get_submodule(name).register_forward_hook(lambda *_: None)
    for _ in range(2):
        with pytest.raises(FrozenError, match=f"{name.rpartition('.')[2]} has hooks, which"):
            frozen(images)
        if name.startswith("ciema."):
            lines = [line for line in fused.explain(frozen).lines if line.block == "ciema"]
            assert not any(line.chosen for line in lines)
            assert all("has hooks, which weights packed once" in line.reason for line in lines)
    hook.remove()
    child: Any = frozen.get_submodule(name)
    if name != "ciema":  # its own class is not that of its calls
        child.forward = lambda x: x
        with pytest.raises(FrozenError, match="has a forward of its own, which"):
            frozen(images)
        del child.forward
    assert torch.equal(frozen(images), want)
    calls: list[int] = []
    frozen.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(frozen(images), want)  # its own are called
    assert calls == [1]


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


def test_weights_of_one_call_each_are_told_apart() -> None:
    """Those gone leave their ids and memory to the next."""
    model, x = ciema().requires_grad_(False), torch.randn(2, 24, 6, 5)
    frozen, weight = optimize_for_inference(model), model.conv3x3.weight
    for scale in range(1, 30):
        swapped = [
            functional_call(m, {"conv3x3.weight": weight * scale}, (x,)) for m in (frozen, model)
        ]
        assert error(*swapped) < 1e-5, scale
    for scale in range(1, 30):
        del frozen.conv3x3.weight
        frozen.conv3x3.weight = nn.Parameter(weight * scale, requires_grad=False)
        assert error(frozen(x), functional_call(model, dict(frozen.named_parameters()), x)) < 1e-5


@pytest.mark.parametrize("make", [ciema, network, lambda: nn.Sequential(ciema()).eval()])
def test_a_frozen_copy_goes_with_its_last_user(make: Callable[[], nn.Module]) -> None:
    model = make()
    frozen = optimize_for_inference(model)
    gone = weakref.ref(frozen)
    gc.disable()
    try:
        with pytest.raises(FrozenError):
            frozen.train()
        del frozen
        assert gone() is None
    finally:
        gc.enable()


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


def test_a_frozen_fusion_takes_its_maps_as_the_layer_does() -> None:
    block = FusedMSFF([4, 8]).eval()
    frozen = optimize_for_inference(nn.ModuleList([block]).eval())[0]
    maps = {"a": torch.randn(1, 4, 6, 6), "b": torch.randn(1, 8, 3, 3)}
    want = block(features=maps.values()).detach()
    for given in (maps.values(), list(maps.values()), tuple(maps.values()), iter(maps.values())):
        torch.testing.assert_close(frozen(given), want)
    torch.testing.assert_close(frozen(features=maps.values()), want)
    with pytest.raises(TypeError, match="features"):
        frozen()
    maps["a"].requires_grad_()
    for given in (maps.values(), list(maps.values())):
        with pytest.raises(FrozenError, match="an input requires grad"):
            frozen(given)
        with pytest.raises(FrozenError, match="an input requires grad"):
            frozen(features=given)
