"""What the layers refuse, whether their stages run or their children are called one by one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_modules import hook
from torch import nn

from fused import FusedCIEMA, FusedMSFF, fuse, optimize_for_inference
from mobilesteelnet.model import MobileSteelNet


@pytest.mark.parametrize("hooked", [False, True], ids=["ops", "children"])
@pytest.mark.parametrize(
    ("x", "kind", "words"),
    [
        (None, TypeError, "x must be a tensor, got NoneType"),
        ([torch.ones(1, 8, 2, 2)], TypeError, "x must be a tensor, got list"),
        (torch.ones(8, 2, 2), ValueError, r"x must be \(B, C, H, W\), got shape \(8, 2, 2\)"),
        (torch.ones(1, 8, 2, 2, 2), ValueError, r"x must be \(B, C, H, W\)"),
        (torch.ones(0, 8, 2, 2), ValueError, "x is empty"),
        (torch.ones(1, 8, 2, 2).int(), TypeError, "x has dtype torch.int32"),
        (torch.ones(1, 6, 2, 2), ValueError, "x has 6 channels"),
    ],
    ids=["None", "list", "3-D", "5-D", "empty", "int", "channels"],
)
def test_both_ways_refuse_the_same_input_by_name(
    hooked: bool, x: object, kind: type[Exception], words: str
) -> None:
    ciema, msff = FusedCIEMA(8, 2).eval(), FusedMSFF([8]).eval()
    if hooked:
        hook(ciema), msff.fusion_conv.register_forward_hook(lambda *_: None)
    for call in (ciema, ciema.interact, ciema.spatial_gate):
        with pytest.raises(kind, match=f"FusedCIEMA: {words}"):
            call(x)
    words = words.replace("x has 6", "features have [6]").replace("x ", "features[0] ", 1)
    with pytest.raises(kind, match=words.replace("[", r"\[").replace("]", r"\]")):
        msff([x])
    for features in (None, 5):
        with pytest.raises(TypeError, match="FusedMSFF: features must be a list of maps, got"):
            msff(features)


def test_interact_of_a_block_whose_children_are_called() -> None:
    block = FusedCIEMA(8, 2).eval()
    block.channel_interaction.fc[2].bias = nn.Parameter(torch.ones(8))
    x = torch.randn(2, 8, 3, 3)
    assert torch.equal(block.interact(x), block.channel_interaction(x))


def test_the_rest_names_what_it_refuses() -> None:
    block, network = FusedCIEMA(8, 2).eval(), MobileSteelNet(width=0.0625).eval()
    for ciema in (block, optimize_for_inference(block)):
        with torch.no_grad():
            with pytest.raises(ValueError, match="CIEMA: x has 6 channels"):
                ciema.mean_after(torch.ones(1, 6, 2, 2))
            with pytest.raises(TypeError, match="CIEMA: x must be a tensor, got NoneType"):
                ciema.mean_after(None)
    for model in (network, optimize_for_inference(network)):
        for images, words in (
            (None, "must be a tensor, got NoneType"),
            ([torch.ones(1, 3, 32, 32)], "must be a tensor, got list"),
            (torch.ones(1, 3, 32, 32).byte(), "has dtype torch.uint8"),
        ):
            with pytest.raises(TypeError, match=f"MobileSteelNet: images {words}"):
                model(images)
        with pytest.raises(ValueError, match="images is empty"):
            model(torch.ones(0, 3, 32, 32))
    with pytest.raises(TypeError, match="fuse: model must be a module, got int"):
        fuse(5)


@pytest.mark.parametrize(
    ("build", "kind", "words"),
    [
        (lambda: FusedCIEMA(64.0), TypeError, r"channels=64\.0, expected a whole number"),
        (lambda: FusedCIEMA("64"), TypeError, "channels='64', expected a whole number"),
        (lambda: FusedCIEMA(3), ValueError, "channels=3, at least 4 expected"),
        (lambda: FusedCIEMA(64, 2.0), TypeError, r"factor=2\.0, expected a whole number"),
        (lambda: FusedCIEMA(64, 0), ValueError, "groups=0 does not divide"),
        (lambda: FusedCIEMA(64, 2, None), TypeError, "reduction=None, expected a whole number"),
        (lambda: FusedMSFF(5), TypeError, "stage_channels=5, expected a list"),
        (lambda: FusedMSFF("35"), TypeError, "stage_channels='35', expected a list"),
        (lambda: FusedMSFF([]), ValueError, "stage_channels="),
        (lambda: FusedMSFF([4, 3.5]), TypeError, r"stage_channels\[1\]=3\.5, expected a whole"),
        (lambda: FusedMSFF([4], 0), ValueError, "out_channels=0, at least 1 expected"),
        (lambda: MobileSteelNet(6.0), TypeError, r"num_classes=6\.0, expected a whole"),
        (lambda: MobileSteelNet(width="1"), TypeError, "width='1', expected a number"),
        (lambda: MobileSteelNet(dropout=None), TypeError, "dropout=None, expected a number"),
    ],
)
def test_constructors_name_what_they_refuse(
    build: Callable[[], nn.Module], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        build()
