"""The stratified split into training, validation and test pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from .pictures import DataError

if TYPE_CHECKING:
    from .data import PictureSet

SIDES = ("train", "val", "test")
"""The sides of a split, in the order of `fractions`."""


@dataclass(frozen=True)
class Split:
    """Indexes of a picture set, each on one side, ascending.

    Attributes:
        train: indexes to learn from.
        val: indexes for early stopping and choice of the checkpoint.
        test: indexes to report on.
        fractions: the shares that were asked for.
        seed: the seed it was drawn with.
    """

    train: list[int]
    val: list[int]
    test: list[int]
    fractions: tuple[float, float, float] = field(default=(0.05, 0.05, 0.90))
    seed: int = 42

    def to_dict(self, pictures: PictureSet) -> dict[str, Any]:
        """A JSON-able form that names the pictures, for the record of a run."""
        return {
            "seed": self.seed,
            "fractions": list(self.fractions),
            **{side: [pictures.items[i].name for i in getattr(self, side)] for side in SIDES},
            "pixels": {side: _pixels(pictures, getattr(self, side)) for side in SIDES},
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any], pictures: PictureSet) -> Split:
        """Finds the pictures of a recorded split again.

        Raises:
            DataError: a picture of the record is missing from the set, is in it twice, or has other
                pixels now.
        """
        if not isinstance(record, Mapping):
            raise DataError(f"the recorded split is a {type(record).__name__}, no object")
        index = {picture.name: i for i, picture in enumerate(pictures.items)}
        sides: dict[str, list[int]] = {}
        seen: set[str] = set()
        for side in SIDES:
            names = record.get(side)
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise DataError(f"the recorded split has no list of names {side!r}")
            missing = [name for name in names if name not in index]
            if missing:
                raise DataError(
                    f"{len(missing)} pictures of the recorded split are missing from "
                    f"{str(pictures.path)!r}, the first is {missing[0]!r}"
                )
            for name in names:
                if name in seen:
                    raise DataError(f"the recorded split has {name!r} twice")
                seen.add(name)
            sides[side] = [index[name] for name in names]
        _check_pixels(record.get("pixels"), sides, pictures)
        sides = {side: sorted(indexes) for side, indexes in sides.items()}
        fractions = _checked_fractions(record.get("fractions", (0.05, 0.05, 0.90)))
        return cls(**sides, fractions=fractions, seed=_checked_seed(record.get("seed", 42)))


def stratified_split(
    pictures: PictureSet,
    fractions: Sequence[float] = (0.05, 0.05, 0.90),
    seed: int = 42,
) -> Split:
    """Divides every class by the same fractions; exact duplicates stay on one side.

    The counts of a class are its fractions by largest remainder (300 pictures at 5/5/90 % give
    15/15/270), unless groups of duplicates leave no such choice. The draw depends on the seed, the
    class names and the file names only: not on the machine, the order of the files or whether the
    set is a folder or a zip.

    Args:
        pictures: a labelled set.
        fractions: shares of training, validation and test; they sum to 1, the first is above 0.
        seed: any whole number.

    Returns:
        The indexes of each side, ascending.

    Raises:
        DataError: fractions that make no sense, or a class with too few pictures for them.
    """
    shares = _checked_fractions(fractions)
    _checked_seed(seed)
    labels = pictures.labels
    capacity = []
    for label, name in enumerate(pictures.classes):
        count = labels.count(label)
        quota = _largest_remainder(count, shares)
        if any(share > 0 and amount == 0 for share, amount in zip(shares, quota, strict=True)):
            raise DataError(
                f"class {name!r} has {count} pictures, too few for fractions={shares}: "
                f"at least {_fewest(shares)} are needed"
            )
        capacity.append(list(quota))

    drawn = sorted(range(len(labels)), key=lambda i: _draw(pictures, i, seed))
    side_of = _place_duplicates(pictures, drawn, capacity, seed)
    for i in drawn:
        if i not in side_of:
            room = capacity[labels[i]]
            side = next((s for s in range(3) if room[s] > 0), room.index(max(room)))
            side_of[i] = side
            room[side] -= 1
    _check_no_side_empty(pictures, side_of, shares)
    train, val, test = ([i for i in range(len(labels)) if side_of[i] == s] for s in range(3))
    return Split(train, val, test, shares, seed)


def _place_duplicates(
    pictures: PictureSet, drawn: list[int], capacity: list[list[int]], seed: int
) -> dict[int, int]:
    """Puts every group of duplicates on one side, within the capacities where it can be."""
    side_of: dict[int, int] = {}
    label_of = pictures.labels
    rank = {i: r for r, i in enumerate(drawn)}
    groups = [sorted(group, key=rank.__getitem__) for group in pictures.duplicate_groups()]
    for group in sorted(groups, key=lambda g: (-len(g), rank[g[0]])):
        labels = [label_of[i] for i in group]
        room = [min(capacity[c][s] - labels.count(c) for c in labels) for s in range(3)]
        fitting = [s for s in range(3) if room[s] >= 0]
        if fitting:
            # Drawn in proportion to the room, so that duplicates gather on no side in particular.
            weights = [room[s] + len(group) for s in fitting]
            point = int.from_bytes(_draw(pictures, group[0], seed)[0][-8:], "big")
            point = point * sum(weights) >> 64
            side = next(s for k, s in enumerate(fitting) if point < sum(weights[: k + 1]))
        else:
            side = room.index(max(room))
        for i, c in zip(group, labels, strict=True):
            side_of[i] = side
            capacity[c][side] -= 1
    return side_of


def _check_no_side_empty(
    pictures: PictureSet, side_of: Mapping[int, int], shares: Sequence[float]
) -> None:
    labels = pictures.labels
    filled = {(labels[i], side) for i, side in side_of.items()}
    for label, name in enumerate(pictures.classes):
        for side, share in enumerate(shares):
            if share > 0 and (label, side) not in filled:
                raise DataError(
                    f"class {name!r} has too few different pictures for fractions={tuple(shares)}: "
                    f"duplicates stay together and none is left for {SIDES[side]}"
                )


def _draw(pictures: PictureSet, i: int, seed: int) -> tuple[bytes, str]:
    """Sort key of a picture: a hash, so that it is the same on every machine and layout."""
    picture = pictures.items[i]
    base = picture.name.rpartition("/")[2]
    text = f"{seed}\n{pictures.class_of(i)}\n{base}"
    return hashlib.sha256(text.encode("utf-8")).digest(), picture.name


def _checked_seed(seed: object) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise DataError(f"seed={seed!r} must be a whole number")
    return seed


def _checked_fractions(fractions: Sequence[float]) -> tuple[float, float, float]:
    try:
        values = tuple(float(value) for value in fractions)
    except (TypeError, ValueError) as error:
        raise DataError(f"fractions={fractions!r} must hold three numbers") from error
    if len(values) != 3:
        raise DataError(f"fractions={fractions!r} must hold three shares: train, val, test")
    if not all(0 <= value <= 1 for value in values) or abs(sum(values) - 1) > 1e-6:
        raise DataError(f"fractions={fractions!r} must lie in [0, 1] and sum to 1")
    if values[0] == 0:
        raise DataError(f"fractions={fractions!r} leave nothing to train on")
    return values


def _largest_remainder(count: int, shares: Sequence[float]) -> list[int]:
    decimal = [Fraction(share).limit_denominator(10**6) for share in shares]
    exact = [count * share / sum(decimal) for share in decimal]
    quota = [int(amount) for amount in exact]
    by_remainder = sorted(range(3), key=lambda s: (quota[s] - exact[s], s))
    for s in by_remainder[: count - sum(quota)]:
        quota[s] += 1
    return quota


def _fewest(shares: Sequence[float]) -> int:
    """The fewest pictures of a class from which on every wanted side gets one."""
    count = 1 + int(1 / min(share for share in shares if share > 0))
    while count > 1 and all(
        amount > 0 or share == 0
        for amount, share in zip(_largest_remainder(count - 1, shares), shares, strict=True)
    ):
        count -= 1
    return count


def fold_splits(
    pictures: PictureSet, split: Split, folds: int, repeats: int, seed: int = 42
) -> list[Split]:
    """Cross-validation inside the training and validation pictures of a split.

    Each repetition divides them anew into `folds` stratified parts, exact duplicates together, and
    gives `folds` splits that validate on one part and train on the others. Their test side is
    empty: the test pictures of `split` cannot be read by mistake. With two folds of a 5/5 split, a
    run learns from as many pictures as the real one does.

    Args:
        pictures: a labelled set.
        split: of these pictures.
        folds: parts, at least 2.
        repeats: repetitions, at least 1.
        seed: any whole number.

    Returns:
        `folds`·`repeats` splits.

    Raises:
        DataError: too few pictures of a class.
        ValueError: an argument is out of range.
    """
    if folds < 2 or repeats < 1:
        raise ValueError(f"folds={folds}, repeats={repeats}: at least 2 and 1 are needed")
    pool = sorted([*split.train, *split.val])
    labels = pictures.labels
    share = 1 / folds
    splits = []
    for repeat in range(repeats):
        part_of = _deal(pictures, pool, folds, seed=_checked_seed(seed) + 1_000_003 * repeat)
        for part in range(folds):
            val = [i for i in pool if part_of[i] == part]
            train = [i for i in pool if part_of[i] != part]
            for label, name in enumerate(pictures.classes):
                if not any(labels[i] == label for i in val) or not any(
                    labels[i] == label for i in train
                ):
                    raise DataError(f"class {name!r} has too few pictures for folds={folds}")
            splits.append(Split(train, val, [], (1 - share, share, 0.0), seed))
    return splits


def _deal(pictures: PictureSet, pool: Sequence[int], folds: int, seed: int) -> dict[int, int]:
    """Deals pictures out to the parts, each to the one that has the fewest of its class."""
    labels = pictures.labels
    together: dict[str, list[int]] = {}
    for i in sorted(pool, key=lambda i: _draw(pictures, i, seed)):
        together.setdefault(pictures.items[i].digest, []).append(i)
    counts = [[0] * len(pictures.classes) for _ in range(folds)]
    part_of: dict[int, int] = {}
    for group in together.values():
        label = labels[group[0]]
        part = min(range(folds), key=lambda k: (counts[k][label], sum(counts[k]), k))
        for i in group:
            part_of[i] = part
            counts[part][labels[i]] += 1
    return part_of


_DIGEST = 16  # hexadecimal digits: enough to tell pictures apart, and short in a checkpoint
_SEEN = ("train", "val")


def _pixels(pictures: PictureSet, indexes: Sequence[int]) -> str:
    return "".join(pictures.items[i].digest[:_DIGEST] for i in indexes)


def _check_pixels(recorded: Any, sides: Mapping[str, Sequence[int]], pictures: PictureSet) -> None:
    """Refuses other pictures under the names of the recorded ones; older records cannot tell."""
    if not isinstance(recorded, Mapping):
        return
    changed = []
    for side, indexes in sides.items():
        was, now = str(recorded.get(side)), _pixels(pictures, indexes)
        places = [slice(k * _DIGEST, (k + 1) * _DIGEST) for k in range(len(indexes))]
        changed += [i for i, at in zip(indexes, places, strict=True) if was[at] != now[at]]
    if changed:
        raise DataError(
            f"{len(changed)} pictures of the recorded split have other pixels in "
            f"{str(pictures.path)!r} than when it was drawn, the first is "
            f"{pictures.items[changed[0]].name!r}: these are other pictures"
        )


def seen_pictures(split: Split, pictures: PictureSet, earlier: Any = None) -> dict[str, str]:
    """What a checkpoint keeps of the pictures that its training saw: their pixels' digests.

    Args:
        split: of this training.
        pictures: the set that it divides.
        earlier: the same of the checkpoint that the training started from, whose pictures the
            network knows as well; anything else says nothing.
    """
    seen: dict[str, dict[str, None]] = {}
    for side in _SEEN:
        own = (pictures.items[i].digest[:_DIGEST] for i in getattr(split, side))
        seen[side] = dict.fromkeys([*own, *_digests(earlier).get(side, ())])
    for digest in seen["train"]:
        seen["val"].pop(digest, None)  # what was learnt once is no validation any more
    return {side: "".join(seen[side]) for side in _SEEN}


def _digests(seen: Any) -> dict[str, list[str]]:
    """The digests of each side in what :func:`seen_pictures` gave; empty for anything else."""
    if not isinstance(seen, Mapping) or not all(isinstance(seen.get(s), str) for s in _SEEN):
        return {}
    return {
        side: [text[start : start + _DIGEST] for start in range(0, len(text), _DIGEST)]
        for side, text in ((side, seen[side]) for side in _SEEN)
    }


def recognise(seen: Any, pictures: PictureSet) -> dict[str, list[int]] | None:
    """Indexes by side of pictures that a training may have seen, whatever they are called now.

    Args:
        seen: what :func:`seen_pictures` gave; anything else says nothing.
        pictures: any set.

    Returns:
        ``train``, ``val``, and ``test`` for all others; None if none of them was seen.
    """
    side_of = {digest: side for side, group in _digests(seen).items() for digest in group}
    if not side_of:
        return None
    parts: dict[str, list[int]] = {side: [] for side in SIDES}
    for i, picture in enumerate(pictures.items):
        parts[side_of.get(picture.digest[:_DIGEST], "test")].append(i)
    return parts if any(parts[side] for side in _SEEN) else None
