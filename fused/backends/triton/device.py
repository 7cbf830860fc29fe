"""Device functions that several stages' kernels share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def offset(index, stride, WIDE: tl.constexpr):
    """index · stride, in 64 bits where the launcher found that 32 do not suffice."""
    # No early return: Triton would compile both and find two types.
    return index.to(tl.int64) * stride if WIDE else index * stride


@triton.jit
def merge_moments(mean, m2, count):
    """Mean, M2 and count of a union from those of its parts along axis 0 (Chan et al. 1983).

    Args:
        mean: (parts, n) float32 means.
        m2: (parts, n) sums of squared deviations from the part's own mean.
        count: (parts, 1) or (parts, n) values in each part, float32; 0 for a part that is absent.
    """
    total = tl.maximum(tl.sum(count, axis=0), 1.0)
    merged = tl.sum(mean * count, axis=0) / total
    deviation = mean - merged[None, :]
    return merged, tl.sum(m2 + deviation * deviation * count, axis=0), total
