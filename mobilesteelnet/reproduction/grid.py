"""Which networks a table of the paper compares, with which options, and which runs that makes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from typing import Any

from ..initialisation import MOBILESTEELNET_OPTIONS
from ..networks import BASELINES
from ..recipes import PUBLISHED, recipe_options
from ..train_config import TrainConfig

FIRST_SEED = 42
"""Of the split of every run, and of the first run of each network."""


@dataclass(frozen=True)
class Network:
    """A row of a table: a name, and the options that make the network."""

    name: str
    options: dict[str, Any]


NETWORKS: dict[str, Network] = {
    "backbone": Network("MobileNetV1 (published blocks)", {"attention": "none", "fusion": "none"}),
    "msff": Network("+ MSFF", {"attention": "none"}),
    "ciema": Network("+ CIEMA", {"fusion": "none"}),
    "mobilesteelnet": Network("MobileSteelNet", {}),
    "no-cross-spatial": Network(
        "without cross-spatial learning", {"attention": "ciema-no-cross-spatial"}
    ),
    "no-channel-interaction": Network(
        "without channel interaction", {"attention": "ciema-no-channel-interaction"}
    ),
    "se": Network("SE in CIEMA's place", {"attention": "se"}),
    "eca": Network("ECA", {"attention": "eca"}),
    "cbam": Network("CBAM", {"attention": "cbam"}),
    "ca": Network("CA", {"attention": "ca"}),
    "ema": Network("EMA", {"attention": "ema"}),
    **{key: Network(item.name, {"network": key}) for key, item in BASELINES.items()},
}


ROW_OPTIONS = frozenset(option for network in NETWORKS.values() for option in network.options)
"""The options by which the rows of a table differ."""


@dataclass(frozen=True)
class Table:
    """A table of the paper.

    Attributes:
        title: What it compares.
        rows: Keys of :data:`NETWORKS`.
    """

    title: str
    rows: tuple[str, ...]


TABLES: dict[str, Table] = {
    "table7": Table(
        "Table 7: ablation of both modules", ("backbone", "msff", "ciema", "mobilesteelnet")
    ),
    "table9": Table(
        "Table 9: inside CIEMA",
        ("no-cross-spatial", "no-channel-interaction", "mobilesteelnet"),
    ),
    "table5": Table(
        "Table 5: attention on the same backbone and MSFF",
        ("se", "eca", "cbam", "ca", "ema", "mobilesteelnet"),
    ),
    "table4": Table(
        "Table 4: architectures, from scratch", (*BASELINES, "backbone", "mobilesteelnet")
    ),
    "ours": Table("MobileSteelNet by the chosen recipe", ("mobilesteelnet",)),
}
COST_TABLES: dict[str, Table] = {
    "table6": Table("Table 6: cost", TABLES["table4"].rows),
    "table8": Table("Table 8: time of the modules", TABLES["table7"].rows),
}


@dataclass(frozen=True)
class PlannedRun:
    """One training that a table needs.

    Attributes:
        network: Key of :data:`NETWORKS`.
        recipe: Name of the recipe.
        seed: Of the training; the split is that of :data:`FIRST_SEED`.
    """

    network: str
    recipe: str
    seed: int

    @property
    def name(self) -> str:
        """As its files are called."""
        return f"{self.network}-seed{self.seed}"

    def config(self, data: str, changes: dict[str, Any]) -> TrainConfig:
        """Its options; ``changes`` replace those of the recipe."""
        options = {**recipe_options(self.recipe), **changes}
        network = NETWORKS[self.network].options
        if "network" in network:  # what a recipe says of MobileSteelNet's blocks is not for others
            options = {k: v for k, v in options.items() if k not in MOBILESTEELNET_OPTIONS}
        return TrainConfig(
            **{"data": data, "split_seed": FIRST_SEED, **options, **network, "seed": self.seed}
        )


def plan_runs(table: str, seeds: int, recipe: str = PUBLISHED) -> list[PlannedRun]:
    """The runs of a table, seed by seed, so that every network has one before any has two.

    Raises:
        ValueError: The table is unknown, or ``seeds`` below 1.
    """
    if table not in TABLES:
        raise ValueError(f"table={table!r}: must be one of {', '.join(TABLES)}")
    if seeds < 1:
        raise ValueError(f"seeds={seeds}: must be 1 or more")
    numbers = range(FIRST_SEED, FIRST_SEED + seeds)
    return [PlannedRun(network, recipe, seed) for seed in numbers for network in TABLES[table].rows]


def paper_figures() -> dict[str, Any]:
    """What the paper reports, from ``paper.json``."""
    text = resources.files(__package__).joinpath("paper.json").read_text("utf-8")
    figures: dict[str, Any] = json.loads(text)
    return figures
