"""Whether a network's probabilities can be trusted: calibration error, and what rejecting buys.

:func:`fit_temperature` makes them more trustworthy (temperature scaling: Guo et al., ICML 2017).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

BINS = 15
LEAST_PICTURES = 10
"""To fit a checkpoint's temperature to; fewer say more about chance than about the network."""
LEAST_TEMPERATURE, LARGEST_TEMPERATURE = 0.05, 20.0
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
    # It has a bin of its own for 1, which the diagram has not.
    below_one = probabilities.clamp(max=1 - torch.finfo(probabilities.dtype).eps)
    error = multiclass_calibration_error(
        below_one, truth, num_classes=probabilities.shape[1], n_bins=BINS, norm="l1"
    )
    confidence, chosen = probabilities.double().max(1)
    right = chosen == truth
    return Calibration(
        float(error),
        [_bin(k / BINS, (k + 1) / BINS, confidence, right) for k in range(BINS)],
        [_coverage(threshold, confidence, right) for threshold in THRESHOLDS],
    )


def fit_temperature(logits: torch.Tensor, truth: torch.Tensor) -> float:
    """The temperature T for which softmax(logits / T) has the lowest cross-entropy.

    It changes no decision, only how sure the network says it is. N pictures can't show that errors
    are rarer than one in N + 2 (Laplace's rule): each true class counts as 1 - 1/(N + 2), so that
    a network that is right on all of them does not become certain.

    Args:
        logits: (N, classes) of pictures that the network did not learn from; N is at least 1.
        truth: (N,) their classes.

    Returns:
        From 0.05 to 20, to four digits; 1 where there is one class only.
    """
    scores = logits.detach().double().cpu()
    count, classes = scores.shape
    if classes < 2:
        return 1.0
    doubt = 1 / (count + 2)
    wanted = torch.full_like(scores, doubt / (classes - 1))
    wanted[torch.arange(count), truth.cpu()] = 1 - doubt

    def slope(sharpness: float) -> float:
        """Of the cross-entropy, which is convex in 1/T."""
        return float((((sharpness * scores).softmax(1) - wanted) * scores).sum())

    low, high = 1 / LARGEST_TEMPERATURE, 1 / LEAST_TEMPERATURE
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return float(f"{1 / low:.4g}")


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
