"""Arguments of the shared product (csrc/cuda/product.cuh), and which of its tiles is taken."""

from __future__ import annotations

import torch

from ..maps import is_channels_last, readable
from .launch import launch, multiprocessors, takes_tf32

# Channels and pixels of the tiles 0, 1 and 2 of csrc/cuda/product_launch.cuh.
TILES = (32, 64, 128)
_EMULATED_MULTIPROCESSORS = 108  # an A100's


def choose_tile(like: torch.Tensor, batch: int, rows: int, pixels: int) -> int:
    """The largest tile of which there is one for every multiprocessor, else the smallest."""
    wanted = multiprocessors(like.device) or _EMULATED_MULTIPROCESSORS
    for tile in reversed(range(len(TILES))):
        size = TILES[tile]
        if batch * -(-rows // size) * -(-pixels // size) >= wanted:
            return tile
    return 0


def parts(tile: int, batch: int, pixels: int) -> int:
    """How many tiles of pixels there are: the first size of a product's partial sums."""
    return batch * -(-pixels // TILES[tile])


def numbers(
    like: torch.Tensor, weight: torch.Tensor, shape: tuple[int, int, int], tile: int
) -> dict[str, int]:
    """Sizes and flags of a product with results (batch, rows, pixels) in the layout of `like`."""
    batch, rows, pixels = shape
    return {
        **{"batch": batch, "rows": rows, "pixels": pixels, "tile": tile},
        "channels_last": int(is_channels_last(like)),
        "weight_is_float": int(weight.dtype == torch.float32),
        "tf32": takes_tf32(),
    }


def rows_of(weight: torch.Tensor) -> torch.Tensor:
    """A 1×1 convolution's weight as (rows, channels), of which the channels are neighbours."""
    matrix = weight.flatten(1)
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def in_layout_of(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A `readable` map with the same axis as neighbours as `like`: x itself, or a copy of it."""
    x = readable(x)
    if is_channels_last(x) == is_channels_last(like):
        return x
    last = is_channels_last(like)
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def join_moments(
    partials: torch.Tensor, pixels: int, tile: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance (rows,) from the moments (parts, 2, rows) of a product's tiles.

    Args:
        partials: as the product's launch left them.
        pixels: of a sample.
        tile: the tile of that launch.
    """
    count, _, rows = partials.shape
    mean, var = partials.new_empty(rows), partials.new_empty(rows)
    sizes = {"parts": count, "rows": rows, "pixels": pixels, "tile_pixels": TILES[tile]}
    launch(
        *("product_moments", torch.float32),
        reads={"partials": partials},
        writes={"mean": mean, "var": var},
        numbers=sizes,
    )
    return mean, var


def room_for_extremes(
    tile: int, like: torch.Tensor, rows: int, pixels: int
) -> dict[str, torch.Tensor]:
    """Where the tiles of a product leave their parts of its results' channel statistics."""
    count = parts(tile, like.shape[0], pixels)
    return {
        "extremes": like.new_empty((count, 2, rows), dtype=torch.float32),
        "positions": like.new_empty((count, rows), dtype=torch.int32),
    }


def join_extremes(
    parts_of_tiles: dict[str, torch.Tensor], batch: int, pixels: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean, maximum and argmax (batch, rows) from what `room_for_extremes` got."""
    count, rows = parts_of_tiles["positions"].shape
    mean = parts_of_tiles["extremes"].new_empty((batch, rows))
    maximum, argmax = torch.empty_like(mean), torch.empty_like(mean, dtype=torch.int64)
    launch(
        *("product_extremes", torch.float32),
        reads=parts_of_tiles,
        writes={"mean": mean, "maximum": maximum, "argmax": argmax},
        numbers={"batch": batch, "tiles": count // batch, "rows": rows, "pixels": pixels},
    )
    return mean, maximum, argmax
