import pytest

from zramd.status.percentile import percentile

BOUNDS = [100, 200, 400]


@pytest.mark.parametrize(
    ("buckets", "share", "expected"),
    [
        ([0, 0, 0, 0], 0.5, None),
        ([4, 0, 0, 0], 0.5, 50.0),
        ([0, 4, 0, 0], 0.0, 100.0),
        ([0, 4, 0, 0], 1.0, 200.0),
        ([1, 0, 1, 0], 0.5, 100.0),
        ([1, 0, 1, 0], 0.75, 300.0),
        ([0, 0, 0, 1], 0.5, 400.0),
        ([98, 1, 0, 1], 0.99, 200.0),
    ],
)
def test_percentile_is_spread_evenly_within_a_bucket_and_the_last_bound_beyond_it(
    buckets: list[int], share: float, expected: float | None
) -> None:
    assert percentile(BOUNDS, buckets, share) == expected
