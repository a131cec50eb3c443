"""Percentiles of what is counted in buckets; for clients too, so nothing of the server is imported."""

from collections.abc import Sequence


def percentile(bounds: Sequence[int], buckets: Sequence[int], share: float) -> float | None:
    """Return what so large a share (0 to 1) of what is counted took at most, None if nothing is.

    `buckets` are counts up to each of the `bounds` (not of all before too), and one beyond. Within a bucket the counts
    are taken as spread evenly, as Prometheus' histogram_quantile does; what lies beyond the last bound counts as that.
    """
    total = sum(buckets)
    if not total:
        return None
    wanted, below, bound = share * total, 0, 0
    for count, upper in zip(buckets, bounds, strict=False):
        if count and below + count >= wanted:
            return bound + (upper - bound) * max(0.0, wanted - below) / count
        below += count
        bound = upper
    return float(bounds[-1])
