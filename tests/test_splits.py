"""The stratified split: counts, duplicates, independence of order and machine, its record."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

pytest.importorskip("PIL", reason="Pillow is not installed")

from mobilesteelnet.data import DataError, Picture, PictureSet, Split, stratified_split
from mobilesteelnet.pictures import Folder


def picture_set(tmp: Path, members: list[tuple[str, int, int]], prefix: str = "") -> PictureSet:
    """A set of (class, number, content) without files: pictures of equal content are duplicates."""
    names = sorted({name for name, _, _ in members})
    items = [
        Picture(
            f"{prefix}{name}/{name}_{number}.png",
            names.index(name),
            8,
            8,
            hashlib.sha256(str(content).encode()).hexdigest(),
            1.0,
        )
        for name, number, content in members
    ]
    return PictureSet(tmp, names, items, [], "made by the test", Folder(tmp, only="none"))


def plain(tmp: Path, counts: dict[str, int]) -> PictureSet:
    members = [(name, n, f"{name}{n}") for name, count in counts.items() for n in range(count)]
    return picture_set(tmp, members)


def per_class(pictures: PictureSet, side: list[int]) -> list[int]:
    return [
        sum(pictures.labels[i] == label for i in side) for label in range(len(pictures.classes))
    ]


@pytest.mark.parametrize(
    ("count", "fractions", "expected"),
    [
        (300, (0.05, 0.05, 0.90), (15, 15, 270)),
        (10, (0.7, 0.15, 0.15), (7, 2, 1)),
        (10, (1 / 3, 1 / 3, 1 / 3), (4, 3, 3)),
        (7, (0.9, 0.1, 0), (6, 1, 0)),
        (7, (1, 0, 0), (7, 0, 0)),
        (1000, (0.29, 0.01, 0.7), (290, 10, 700)),
    ],
)
def test_counts_are_the_largest_remainder(tmp_path, count, fractions, expected):
    pictures = plain(tmp_path, {"a": count, "b": 2 * count})
    split = stratified_split(pictures, fractions)
    sides = (split.train, split.val, split.test)
    assert tuple(per_class(pictures, side)[0] for side in sides) == expected
    assert sorted([i for side in sides for i in side]) == list(range(3 * count))
    assert all(side == sorted(side) for side in sides)


def test_same_split_whatever_the_order_and_the_root(tmp_path):
    pictures = plain(tmp_path, {"a": 40, "b": 60})
    members = [(p.name.split("/")[0], int(p.name[4:-4]), p.digest) for p in pictures.items]
    random.Random(3).shuffle(members)
    shuffled = picture_set(tmp_path, members, prefix="NEU-DET/train/images/")
    first, second = stratified_split(pictures), stratified_split(shuffled)
    for side in ("train", "val", "test"):
        names = {f"NEU-DET/train/images/{pictures.items[i].name}" for i in getattr(first, side)}
        assert names == {shuffled.items[i].name for i in getattr(second, side)}


def test_the_draw_is_fixed_for_all_times(tmp_path):
    # Drawn when the split was written; a change would give other pictures for the same seed.
    pictures = plain(tmp_path, {"a": 20, "b": 20})
    split = stratified_split(pictures, (0.1, 0.1, 0.8), seed=42)
    assert [pictures.items[i].name for i in split.train] == [
        "a/a_7.png",
        "a/a_9.png",
        "b/b_8.png",
        "b/b_10.png",
    ]
    assert stratified_split(pictures, (0.1, 0.1, 0.8), seed=43).train != split.train


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 200)), min_size=60, max_size=120),
    st.integers(0, 2**64),
)
def test_duplicates_stay_together_and_counts_stay_close(tmp_path_factory, drawn, seed):
    members = [(name, n, content) for n, (name, content) in enumerate(drawn)]
    pictures = picture_set(tmp_path_factory.getbasetemp(), members)
    for name in pictures.classes:
        different = {p.digest for i, p in enumerate(pictures.items) if pictures.class_of(i) == name}
        assume(len(different) >= 12)
    split = stratified_split(pictures, (0.5, 0.2, 0.3), seed)
    sides = (split.train, split.val, split.test)
    assert sorted([i for side in sides for i in side]) == list(range(len(members)))
    side_of = {i: s for s, side in enumerate(sides) for i in side}
    for group in pictures.duplicate_groups():
        assert len({side_of[i] for i in group}) == 1
    assert all(count > 0 for side in sides for count in per_class(pictures, side))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 12))
def test_a_few_pairs_do_not_change_the_counts(tmp_path_factory, seed, pairs):
    members = [("a", n, n // 2 if n < 2 * pairs else 1000 + n) for n in range(100)]
    members += [("b", n, 2000 + n) for n in range(50)]
    pictures = picture_set(tmp_path_factory.getbasetemp(), members)
    split = stratified_split(pictures, (0.1, 0.1, 0.8), seed)
    assert per_class(pictures, split.train) == [10, 5]
    assert per_class(pictures, split.val) == [10, 5]


def test_pairs_fall_on_all_sides(tmp_path):
    members = [("a", n, n // 2 if n < 2 else 1000 + n) for n in range(30)]
    members += [("b", n, 2000 + n) for n in range(30)]
    pictures = picture_set(tmp_path, members)
    seen = {
        tuple(0 in s for s in _sides(stratified_split(pictures, (0.4, 0.3, 0.3), seed)))
        for seed in range(40)
    }
    assert len(seen) == 3


def _sides(split: Split) -> tuple[list[int], list[int], list[int]]:
    return split.train, split.val, split.test


def test_a_class_of_copies_is_refused(tmp_path):
    members = [("a", n, 0) for n in range(40)] + [("b", n, 1 + n) for n in range(40)]
    with pytest.raises(DataError, match="class 'a' has too few different pictures"):
        stratified_split(picture_set(tmp_path, members), (0.5, 0.25, 0.25))


@pytest.mark.parametrize(
    ("fractions", "few", "needed"),
    [((0.05, 0.05, 0.9), 10, 14), ((0.5, 0.25, 0.25), 2, 3), ((0.9, 0.1, 0), 3, 6)],
)
def test_a_class_with_too_few_pictures_is_named(tmp_path, fractions, few, needed):
    pictures = plain(tmp_path, {"big": 400, "few": few})
    with pytest.raises(DataError, match=rf"class 'few' has {few} pictures.*at least {needed} are"):
        stratified_split(pictures, fractions)
    stratified_split(plain(tmp_path, {"big": 400, "few": needed}), fractions)


@pytest.mark.parametrize(
    "fractions",
    [(0.5, 0.5), (0.5, 0.5, 0.5), (-0.1, 0.1, 1.0), (0, 0.5, 0.5), (float("nan"), 0.5, 0.5), "abc"],
)
def test_senseless_fractions_are_named(tmp_path, fractions):
    with pytest.raises(DataError, match="fractions="):
        stratified_split(plain(tmp_path, {"a": 100, "b": 100}), fractions)


def test_senseless_seed_is_named(tmp_path):
    with pytest.raises(DataError, match=r"seed=4\.2"):
        stratified_split(plain(tmp_path, {"a": 100, "b": 100}), seed=4.2)


# The record of a run ----------------------------------------------------------------------------


def test_record_survives_json_and_finds_the_pictures_again(tmp_path):
    pictures = plain(tmp_path, {"a": 30, "b": 30})
    split = stratified_split(pictures, (0.2, 0.2, 0.6), seed=7)
    record = json.loads(json.dumps(split.to_dict(pictures)))
    assert record["train"] == [pictures.items[i].name for i in split.train]
    assert Split.from_dict(record, pictures) == split


def test_record_that_does_not_fit_is_refused(tmp_path):
    pictures = plain(tmp_path, {"a": 30, "b": 30})
    record = stratified_split(pictures, (0.2, 0.2, 0.6)).to_dict(pictures)
    for change, message in [
        ({"val": None}, "no list of names 'val'"),
        ({"val": [3]}, "no list of names 'val'"),
        ({"test": ["a/gone.png"]}, "missing from .* 'a/gone.png'"),
        ({"test": record["train"][:1]}, "twice"),
        ({"seed": "x"}, "seed='x'"),
        ({"fractions": 3}, "fractions=3"),
    ]:
        with pytest.raises(DataError, match=message):
            Split.from_dict({**record, **change}, pictures)
    for wrong in ([], None, "x"):
        with pytest.raises(DataError, match="the recorded split is a"):
            Split.from_dict(wrong, pictures)
