"""What is timed on a GPU and in which order: the rows of the tables, most telling first."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

STAGES = ("msff", "channel_interaction", "coordinate_attention", "cross_spatial", "gated_fusion")
SUBJECTS = ("ciema", "network", *STAGES)
FORWARD, TRAINING = "forward", "training"
MODES = (FORWARD, TRAINING)
BATCHES = (1, 8, 32, 64)
# tf32 is float32 whose products round to 10 bits, as a GPU's convolutions do unless told.
PRECISIONS = {FORWARD: ("fp16", "fp32", "bf16", "tf32"), TRAINING: ("bf16", "fp32", "tf32")}
LAYOUTS = ("contiguous", "channels_last")
PUBLISHED = "published"
COMPILED = ("compiled", "compiled-published")
OURS = ("fused-triton", "fused-cuda", "fused-auto")
PROVIDERS = (PUBLISHED, *OURS, "reference", *COMPILED)
# Multiplier of the channel counts, height and width of the pictures; "odd" gives tails everywhere.
SCALES = {"paper": (1.0, 224), "small": (0.25, 112), "odd": (0.25, 72), "tiny": (0.125, 32)}

# Status of a row that was tried: judged right and timed, unable, judged wrong, or lost.
OK, SKIPPED, WRONG, NO_MEMORY, FAILED = "ok", "skipped", "wrong", "out of memory", "failed"
DIED, TIMED_OUT, NOT_RUN = "died", "timed out", "not run"
BAD = (WRONG, FAILED, DIED, TIMED_OUT)
# In front of each line that a process running rows writes for whoever asked.
MARK = "@gpu "
Facts = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One thing to time.

    Attributes:
        subject: a stage, "ciema" or "network".
        mode: "forward" is evaluation without gradients; "training" is forward and backward.
        batch: B.
        precision: "fp32", "tf32", or half: the whole module in it, in training autocast.
        layout: of the maps and weights.
        provider: who computes it; see `providers.py`.
    """

    subject: str
    mode: str
    batch: int
    precision: str
    layout: str
    provider: str

    @property
    def case(self) -> str:
        """The row without its provider: what providers are compared on."""
        return f"{self.subject} {self.mode} b{self.batch} {self.precision} {self.layout}"

    @property
    def key(self) -> str:
        """The row in words; unique."""
        return f"{self.case} {self.provider}"

    @property
    def is_ours(self) -> bool:
        """Whether the kernels of this project compute it."""
        return self.provider in OURS

    def facts(self) -> Facts:
        """The fields and the key, for JSON."""
        return {"key": self.key, **asdict(self)}


def row_of(facts: Facts) -> Row:
    """The row that `Row.facts` describes."""
    return Row(**{name: facts[name] for name in Row.__dataclass_fields__})


def all_rows() -> list[Row]:
    """Every combination."""
    return [
        Row(subject, mode, batch, precision, layout, provider)
        for subject, mode, batch in itertools.product(SUBJECTS, MODES, BATCHES)
        for precision, layout in itertools.product(PRECISIONS[mode], LAYOUTS)
        for provider in PROVIDERS
    ]


def tier(row: Row) -> int:
    """How early a row is wanted, 0 first: time may run out anywhere."""
    whole, contiguous = row.subject in ("ciema", "network"), row.layout == LAYOUTS[0]
    half = row.precision == PRECISIONS[row.mode][0]
    usual_batch = row.batch in ((1, 32) if row.mode == FORWARD else (8, 32))
    usual = usual_batch and row.precision != "tf32"
    if row.provider in COMPILED:
        if not (usual and half and contiguous):
            return 9
        if not whole:
            return 7
        return 1 if row.provider == COMPILED[0] else 4
    if row.provider == "reference" and whole:
        return 8
    if usual and contiguous:
        if whole:
            return 0 if half else 3
        return 2 if half and row.batch != 8 else 6
    if usual and whole:
        return 5
    return 6 if row.precision != "tf32" else 7


def plan(rows: Iterable[Row], only: Sequence[str] = ()) -> list[Row]:
    """The rows in the order in which they are run; those of a case stand together.

    Args:
        rows: in any order.
        only: a row is taken if one of these has all its words in the row's key; all if empty.
    """

    def wanted(row: Row) -> bool:
        words = row.key.split()
        return not only or any(all(w in words for w in text.split()) for text in only)

    def order(row: Row) -> tuple[int, ...]:
        return (
            tier(row),
            *(SUBJECTS.index(row.subject), MODES.index(row.mode), row.batch),
            PRECISIONS[row.mode].index(row.precision),
            LAYOUTS.index(row.layout),
            PROVIDERS.index(row.provider),
        )

    return sorted(filter(wanted, rows), key=order)


def tiny_rows() -> list[Row]:
    """A plan for a smoke test without a GPU: every kind of row once, batch 2."""
    cells = [
        *(("ciema", mode, precision) for mode in MODES for precision in ("fp32", "bf16")),
        ("network", FORWARD, "fp32"),
        *((stage, FORWARD, "fp32") for stage in STAGES),
    ]
    providers = (PUBLISHED, "fused-triton", "fused-auto", "reference")
    return [
        Row(subject, mode, 2, precision, LAYOUTS[0], provider)
        for subject, mode, precision in cells
        for provider in providers
    ]
