"""`fuse` and `from_module`: blocks found by their keys, taken over whole or refused."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import pytest
import torch
from frozen_cases import calibrated
from stage_cases import error
from test_modules import hook, hook_on_a_container, parametrise
from torch import nn
from torch.nn.utils import prune

import fused
from fused import FusedCIEMA, FusedMSFF
from fused.backends.reference.published import PublishedCIEMA, PublishedMSFF


class Foreign(nn.Module):
    """A model that has published-style blocks under names of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fusion = PublishedMSFF([3, 5], 24)
        self.blocks = nn.ModuleList([PublishedCIEMA(24, 4, 4)])

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.blocks[0](self.fusion([x, y]))


def test_fuse_replaces_blocks_and_keeps_parameters_and_keys() -> None:
    model = Foreign().eval()
    x, y = torch.randn(2, 3, 6, 6), torch.randn(2, 5, 3, 3)
    want, keys = model(x, y), list(model.state_dict())
    parameters = list(model.parameters())
    assert fused.fuse(model) is model
    assert isinstance(model.fusion, FusedMSFF)
    assert isinstance(model.blocks[0], FusedCIEMA)
    assert not model.blocks[0].training
    assert sorted(map(id, model.parameters())) == sorted(map(id, parameters))
    assert sorted(model.state_dict()) == sorted(keys)
    assert error(model(x, y), want) < 1e-5
    fused.fuse(model)  # a second time changes nothing
    with pytest.raises(ValueError, match=r"\[3\] channels"):
        model.fusion([x])


def test_fuse_keeps_hooked_and_parametrised_leaves() -> None:
    model = Foreign().double().eval()
    hook(model.blocks[0])
    parametrise(model.blocks[0])
    x, y = torch.randn(2, 3, 6, 6).double(), torch.randn(2, 5, 3, 3).double()
    want = model(x, y)
    torch.testing.assert_close(fused.fuse(model)(x, y), want)


def test_fuse_refuses_what_it_cannot_keep() -> None:
    with pytest.raises(ValueError, match="Linear holds no CIEMA or MSFF"):
        fused.fuse(nn.Linear(2, 2))
    model = Foreign()
    hook_on_a_container(model.blocks[0])
    with pytest.raises(ValueError, match="cross_spatial_learning has hooks"):
        fused.fuse(model)
    with pytest.raises(ValueError, match=r"no CIEMA block, lacks \["):
        FusedCIEMA.from_module(nn.Linear(2, 2))


def test_the_older_variant_is_refused_by_name() -> None:
    model = Foreign()
    model.blocks[0].cross_spatial_conv = nn.Conv2d(6, 6, 3)
    with pytest.raises(ValueError, match="older variant of CIEMA"):
        fused.fuse(model)


def test_a_block_itself_can_be_fused() -> None:
    block = fused.fuse(PublishedCIEMA(24, 4, 4, bn_statistics="pooled"), backend="reference")
    assert isinstance(block, FusedCIEMA)
    assert (block.groups, block.bn_statistics, block.backend) == (4, "pooled", "reference")
    assert isinstance(fused.fuse(PublishedMSFF([2, 3])), FusedMSFF)


# ----------------------------------------------------------------- blocks that are nearly published


def _bias(block: nn.Module) -> None:
    block.final_fusion[0].bias = nn.Parameter(torch.randn(24))


def _linear_bias(block: nn.Module) -> None:
    block.channel_interaction.fc[2].bias = nn.Parameter(torch.randn(24))


def _no_bias(block: nn.Module) -> None:
    block.conv3x3.bias = None


def _plain_tensor_bias(block: nn.Module) -> None:
    del block.final_fusion[0].bias
    block.final_fusion[0].bias = torch.randn(24).double()


def _one_group(block: nn.Module) -> None:
    block.gn = nn.GroupNorm(1, 6)


def _reflected(block: nn.Module) -> None:
    block.conv3x3 = nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect")


def _strided_and_wide(block: nn.Module) -> None:
    block.conv3x3 = nn.Conv2d(6, 6, 3, padding=2, dilation=2)


def _leaky(block: nn.Module) -> None:
    block.multi_scale_fusion[2] = nn.LeakyReLU(0.5)


def _tanh(block: nn.Module) -> None:
    block.final_fusion[2] = nn.Tanh()


def _group_norm(block: nn.Module) -> None:
    block.multi_scale_fusion[4] = nn.GroupNorm(2, 24)


def _no_gn_bias(block: nn.Module) -> None:
    block.gn = nn.GroupNorm(6, 6, bias=False)


def _no_bn_weight(block: nn.Module) -> None:
    block.final_fusion[1].weight = None


def _wide(block: nn.Module) -> None:
    """16 filters inside the fusion, where the published form has 24 // 4."""
    squeeze, expand = nn.Conv2d(24, 16, 1, bias=False), nn.Conv2d(16, 24, 1, bias=False)
    norms = nn.BatchNorm2d(16), nn.BatchNorm2d(24)
    block.multi_scale_fusion = nn.Sequential(squeeze, norms[0], nn.ReLU(), expand, norms[1])


def _patched(block: nn.Module) -> None:
    conv = block.final_fusion[0]
    conv.forward = lambda x: nn.Conv2d.forward(conv, x) + 1


NEARLY: dict[str, tuple[Callable[[nn.Module], None], str]] = {
    "bias": (_bias, "final_fusion.0 has a bias"),
    "bias of a linear layer": (_linear_bias, "channel_interaction.fc.2 has a bias"),
    "bias that is no parameter": (_plain_tensor_bias, "final_fusion.0 has a bias"),
    "GroupNorm of one group": (_one_group, "gn has num_groups=1 for 6 channels"),
    "padding mode": (_reflected, "conv3x3 has padding_mode='reflect'"),
    "dilation": (_strided_and_wide, "conv3x3 has padding=(2, 2)"),
    "activation": (_leaky, "multi_scale_fusion.2 is a LeakyReLU"),
    "gate": (_tanh, "final_fusion.2 is a Tanh"),
    "forward of its own": (_patched, "final_fusion.0 has a forward of its own"),
    "filters": (_wide, "multi_scale_fusion.0 has 16 filters, the published form has 6"),
    "GroupNorm for BatchNorm": (_group_norm, "multi_scale_fusion.4 is a GroupNorm"),
}


@pytest.mark.parametrize("name", NEARLY)
def test_a_nearly_published_block_keeps_its_function(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    change, reason = NEARLY[name]
    model = Foreign()
    change(model.blocks[0])
    model = calibrated(model.double())
    x, y = torch.randn(2, 3, 6, 6).double(), torch.randn(2, 5, 3, 3).double()
    with torch.no_grad():
        want = model(x, y)
        with caplog.at_level(logging.WARNING, "fused"):
            frozen = fused.optimize_for_inference(model)
        assert reason in caplog.text
        torch.testing.assert_close(frozen(x, y), want)
        torch.testing.assert_close(fused.fuse(model)(x, y), want)
    assert model.blocks[0].modular_reason() == reason


@pytest.mark.parametrize(
    "change",
    [_bias, _one_group, _reflected, _leaky, _no_bias, _no_gn_bias, _no_bn_weight, _wide, _patched],
)
@pytest.mark.parametrize("training", [True, False])
def test_a_fused_block_follows_such_a_change(
    change: Callable[[nn.Module], None], training: bool
) -> None:
    published, block = PublishedCIEMA(24, 4, 4), FusedCIEMA(24, 4, 4)
    change(published), change(block)
    block.load_state_dict(published.state_dict())
    published, block = published.double().train(training), block.double().train(training)
    x = torch.randn(2, 24, 5, 4).double()
    assert block.modular_reason()
    torch.testing.assert_close(block(x), published(x))


def test_a_fused_msff_follows_such_a_change() -> None:
    published, block = PublishedMSFF([3, 5], 4), FusedMSFF([3, 5], 4)
    for one in (published, block):
        one.fusion_conv[0].bias = nn.Parameter(torch.ones(4))
    block.load_state_dict(published.state_dict())
    maps = [torch.randn(2, 3, 4, 4), torch.randn(2, 5, 2, 2)]
    assert block.modular_reason() == "fusion_conv.0 has a bias"
    torch.testing.assert_close(block.eval()(maps), published.eval()(maps))


def test_a_module_with_another_norm_is_no_msff_block() -> None:
    module = PublishedMSFF([3, 5], 4)
    module.fusion_conv[1] = nn.GroupNorm(2, 4)
    with pytest.raises(ValueError, match="holds no CIEMA or MSFF"):
        fused.fuse(nn.Sequential(module))
    with pytest.raises(ValueError, match="is no MSFF block"):
        FusedMSFF.from_module(module)


def _dropout_in_a_chain(block: nn.Module) -> None:
    block.multi_scale_fusion.append(nn.Dropout())


def _relu_in_a_chain(block: nn.Module) -> None:
    block.cross_spatial_learning.ms_reduce.append(nn.ReLU())


def _dropout(block: nn.Module) -> None:
    block.drop = nn.Dropout()


def _convolution(block: nn.Module) -> None:
    block.shortcut = nn.Conv2d(24, 24, 1)


def _parameter(block: nn.Module) -> None:
    block.channel_interaction.scale = nn.Parameter(torch.ones(1))


def _buffer(block: nn.Module) -> None:
    block.register_buffer("scale", torch.ones(1))


def _forward(block: nn.Module) -> None:
    original = block.forward
    block.forward = lambda x: original(x)


def _forward_of_a_container(block: nn.Module) -> None:
    _forward(block.multi_scale_fusion)


LOST: dict[str, tuple[Callable[[nn.Module], None], str]] = {
    "child of a chain": (_dropout_in_a_chain, "multi_scale_fusion.5 is a Dropout, which"),
    "activation of a chain": (_relu_in_a_chain, "ms_reduce.2 is a ReLU, which"),
    "child": (_dropout, "drop is a Dropout, which"),
    "child with parameters": (_convolution, "from_module: shortcut has the parameter shortcut."),
    "buffer": (_buffer, "the block itself has the buffer scale, which"),
    "forward": (_forward, "the block itself has a forward of its own, which"),
    "container's forward": (_forward_of_a_container, "multi_scale_fusion has a forward of its own"),
    "parameter": (_parameter, "channel_interaction has the parameter channel_interaction.scale"),
}


def _refused_and_left_alone(
    change: Callable[[nn.Module], object], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = calibrated(Foreign())
    change(model.blocks[0])
    model.eval()
    x, y = torch.randn(2, 3, 6, 6), torch.randn(2, 5, 3, 3)
    want = model(x, y)
    with caplog.at_level(logging.WARNING, "fused"):
        frozen = fused.optimize_for_inference(model)
    assert reason in caplog.text
    assert type(frozen.blocks[0]) is PublishedCIEMA
    assert error(frozen(x, y), want) < 1e-5
    with pytest.raises(ValueError, match="from_module: ") as raised:
        fused.fuse(model)
    assert reason in str(raised.value)


@pytest.mark.parametrize("name", LOST)
def test_what_a_new_block_would_lose_is_refused(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    _refused_and_left_alone(*LOST[name], caplog)


def test_functions_may_be_modules_in_a_foreign_block_and_activations_functions() -> None:
    block = calibrated(PublishedCIEMA(24, 4, 4))
    block.softmax, block.pool_h = nn.Softmax(1), nn.AdaptiveAvgPool2d((None, 1))
    x = torch.randn(2, 24, 5, 4)
    want = block(x)
    del block.final_fusion[2]  # its forward would call a sigmoid
    assert error(fused.fuse(block)(x), want) < 1e-5


# -------------------------------------------------------------------------------------------- hooks

CONTAINERS = (
    *("", "channel_interaction", "channel_interaction.fc", "cross_spatial_learning"),
    *("cross_spatial_learning.spatial_attention", "cross_spatial_learning.ms_reduce"),
    *("multi_scale_fusion", "final_fusion"),
)


@pytest.mark.parametrize("name", CONTAINERS)
def test_hooks_on_containers_are_refused(name: str, caplog: pytest.LogCaptureFixture) -> None:
    def change(block: nn.Module) -> None:
        part = block.get_submodule(name)
        part.register_full_backward_pre_hook(lambda module, grads: None)

    _refused_and_left_alone(change, f"{name or 'the block itself'} has hooks", caplog)


@pytest.mark.parametrize("name", ["channel_interaction.fc.1", "final_fusion.2"])
def test_hooks_on_activations_go_on_being_called(name: str) -> None:
    model, calls = Foreign().eval(), []
    model.blocks[0].get_submodule(name).register_forward_hook(lambda *_: calls.append(name))
    x, y = torch.randn(2, 3, 6, 6), torch.randn(2, 5, 3, 3)
    want, before = model(x, y), len(calls)
    got = fused.fuse(copy.deepcopy(model))(x, y)
    assert error(got, want) < 1e-5
    assert len(calls) == 2 * before > 0


# ------------------------------------------------------------------------------------ then freezing


def test_a_fused_model_keeps_its_modes_and_can_be_frozen() -> None:
    model = calibrated(Foreign())
    twin = fused.fuse(copy.deepcopy(model))
    assert not any(module.training for module in twin.modules())
    x, y = torch.randn(2, 3, 6, 6), torch.randn(2, 5, 3, 3)
    assert error(fused.optimize_for_inference(twin)(x, y), model(x, y)) < 1e-5
    model.train().blocks[0].final_fusion[1].eval()
    fused.fuse(model)
    still = [name for name, module in model.named_modules() if not module.training]
    assert still == ["blocks.0.final_fusion.1"]


# ----------------------------------------------------------------------------------------- the rest


@pytest.mark.parametrize("name", ["conv1x1", "channel_interaction.fc.0", "conv3x3"])
def test_a_parametrised_child_is_kept(name: str) -> None:
    model = Foreign()
    nn.utils.parametrizations.weight_norm(model.blocks[0].get_submodule(name))
    model = calibrated(model)
    x, y = torch.randn(2, 3, 6, 6), torch.randn(2, 5, 3, 3)
    want = model(x, y)
    frozen = fused.optimize_for_inference(model)
    assert type(frozen.blocks[0]) is PublishedCIEMA
    assert error(frozen(x, y), want) < 1e-5
    assert error(fused.fuse(model)(x, y), want) < 1e-5
    assert f"{name} is a Parametrized" in str(model.blocks[0].modular_reason())


@pytest.mark.parametrize(
    "change", [lambda m: prune.l1_unstructured(m, "weight", 0.3), nn.utils.weight_norm]
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_weight_that_a_hook_computes_is_refused_by_name(
    change: Callable[[nn.Module], nn.Module],
) -> None:
    block = PublishedCIEMA(24, 4, 4)
    change(block.conv1x1)
    with pytest.raises(ValueError, match=r"conv1x1.weight is computed by a hook of its module"):
        fused.fuse(nn.Sequential(block))


def test_a_block_that_stands_twice_is_fused_in_both_places() -> None:
    model = nn.Module()
    model.first = model.second = PublishedCIEMA(8, 2)
    fused.fuse(model)
    assert isinstance(model.first, FusedCIEMA)
    assert model.first is model.second


def test_fuse_gives_its_backend_to_blocks_that_were_fused_before() -> None:
    model = nn.Sequential(FusedCIEMA(8, 2, backend="cpu"), FusedMSFF([8]))
    assert [block.backend for block in fused.fuse(model)] == ["cpu", None]
    assert [block.backend for block in fused.fuse(model, "reference")] == ["reference"] * 2
    with pytest.raises(fused.BackendError, match="backend='abacus' is unknown"):
        fused.fuse(model, "abacus")


def test_a_compiled_block_is_fused_before_it_is_compiled() -> None:
    published = PublishedCIEMA(16, 4).eval()
    keys = list(published.state_dict())
    with pytest.raises(ValueError, match=r"fuse: 0 is a compiled block.*fuse the block it was"):
        fused.fuse(nn.Sequential(torch.compile(published, backend="eager")))
    whole = fused.fuse(torch.compile(nn.Sequential(published), backend="eager"))
    calls: list[int] = []
    next(m for m in whole.modules() if isinstance(m, FusedCIEMA)).register_forward_hook(
        lambda *_: calls.append(1)
    )
    x = torch.randn(2, 16, 5, 4)
    torch.testing.assert_close(whole(x), published(x))
    assert calls == [1]

    block = torch.compile(fused.fuse(published), backend="eager")
    stages = [line.stage for line in fused.explain(block).lines if line.chosen]
    assert stages == list(FusedCIEMA.fused_stages)
    with pytest.raises(ValueError, match=r"model is compiled.*freeze the module it was made from"):
        fused.optimize_for_inference(block)
    frozen = torch.compile(fused.optimize_for_inference(block._orig_mod), backend="eager")
    assert list(frozen._orig_mod.state_dict()) == keys
    torch.testing.assert_close(frozen(x), published(x))
