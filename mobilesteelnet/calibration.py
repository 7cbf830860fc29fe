"""Whether a network's probabilities can be trusted: calibration error, and what rejecting buys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

BINS = 15
THRESHOLDS = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 0.995)


@dataclass(frozen=True)
class ConfidenceBin:
    """Pictures whose highest probability lies above ``lower`` and at most at ``upper``.

    Attributes:
        lower, upper: Bounds of the highest probability.
        pictures: How many there are.
        confidence: Mean of their highest probability; None without pictures.
        accuracy: Share of them that are right; None without pictures.
    """

    lower: float
    upper: float
    pictures: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True)
class Coverage:
    """What is left when pictures below a confidence are rejected.

    Attributes:
        threshold: The least confidence that is accepted.
        coverage: Share of the pictures that is accepted.
        accuracy: Share of the accepted ones that are right; None when none is accepted.
    """

    threshold: float
    coverage: float
    accuracy: float | None


@dataclass(frozen=True)
class Calibration:
    """How confidence and accuracy go together; fractions of 1.

    Attributes:
        expected_error: Expected calibration error: the mean distance between confidence and
            accuracy of a bin, weighted by its pictures.
        bins: The reliability diagram.
        coverage: One entry a threshold, rising.
    """

    expected_error: float
    bins: list[ConfidenceBin]
    coverage: list[Coverage]


def calibrate(probabilities: torch.Tensor, truth: torch.Tensor) -> Calibration:
    """Compare confidence with accuracy.

    Args:
        probabilities: (N, classes), each row of sum 1; N is at least 1.
        truth: (N,) the true classes.

    Raises:
        ModuleNotFoundError: torchmetrics is not installed.
    """
    try:
        from torchmetrics.functional.classification import multiclass_calibration_error
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            'calibration needs torchmetrics: pip install "mobilesteelnet[train]"',
            name="torchmetrics",
        ) from None
    error = multiclass_calibration_error(
        probabilities, truth, num_classes=probabilities.shape[1], n_bins=BINS, norm="l1"
    )
    confidence, chosen = probabilities.double().max(1)
    right = chosen == truth
    return Calibration(
        float(error),
        [_bin(k / BINS, (k + 1) / BINS, confidence, right) for k in range(BINS)],
        [_coverage(threshold, confidence, right) for threshold in THRESHOLDS],
    )


def least_threshold(coverage: Sequence[Coverage], accuracy: float) -> Coverage | None:
    """The first threshold from which on the accepted pictures are right often enough, or None."""
    kept = None
    for item in reversed(coverage):
        if item.accuracy is None:
            continue
        if item.accuracy < accuracy:
            break
        kept = item
    return kept


def _bin(
    lower: float, upper: float, confidence: torch.Tensor, right: torch.Tensor
) -> ConfidenceBin:
    inside = (confidence > lower) & (confidence <= upper)
    count = int(inside.sum())
    if not count:
        return ConfidenceBin(lower, upper, 0, None, None)
    shares = confidence[inside].mean(), right[inside].double().mean()
    return ConfidenceBin(lower, upper, count, float(shares[0]), float(shares[1]))


def _coverage(threshold: float, confidence: torch.Tensor, right: torch.Tensor) -> Coverage:
    accepted = confidence >= threshold
    share = float(accepted.double().mean())
    accuracy = float(right[accepted].double().mean()) if bool(accepted.any()) else None
    return Coverage(threshold, share, accuracy)
