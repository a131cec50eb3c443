import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "scripts"))

from bench import parse_disk_size
from expected import Expectation, bare_speeds
from experiments import Growth
from harness import StepError
from measuring import Spread, spread
from report import Results, limits, number, table
from scaling import growth
from workloads import Sample, fio_traffic


def sample(iops: float, server_cpu: float | None = None) -> Sample:
    return Sample(iops, iops * 4096, None, None, None, server_cpu, 1.0, 0.5, 1 << 20)


def test_a_spread_leaves_out_what_is_not_known() -> None:
    assert spread([3.0, None, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    assert spread([None]) is None
    assert spread([]) is None


def test_a_table_is_aligned_and_shows_what_is_not_known_as_a_dash() -> None:
    value = Spread(1234.5, 1000, 2000)
    rows = [["a", number(value), limits(value)], ["longer", number(None), limits(None)]]
    assert list(table(["name", "IOPS", "min..max"], rows)) == [
        "name     IOPS      min..max",
        "a       1,234  1,000..2,000",
        "longer      -             -",
    ]


def test_a_ratio_is_of_the_same_repetition_and_its_median_is_taken_then() -> None:
    results = Results()
    for ours, theirs in ((100, 50), (10, 10), (300, 100)):
        results.add("read", "zramd", sample(ours))
        results.add("read", "peer", sample(theirs))
    assert results.ratio(lambda each: each.iops, ("read", "zramd"), ("read", "peer")) == Spread(2.0, 1.0, 3.0)
    assert results.ratio(lambda each: each.iops, ("read", "zramd"), ("read", "nobody")) is None
    assert results.ratio(lambda each: each.server_cpu, ("read", "zramd"), ("read", "peer")) is None
    assert results.servers("read") == ["zramd", "peer"]


def test_fio_is_read_in_requests_bytes_and_microseconds() -> None:
    job = {
        "mixed": {
            "total_ios": 1000,
            "io_bytes": 4096000,
            "runtime": 500,
            "lat_ns": {"percentile": {"50.000000": 1000, "99.000000": 2000, "99.900000": 3000}},
        },
        "usr_cpu": 10.0,
        "sys_cpu": 30.0,
        "job_runtime": 2000,
    }
    traffic = fio_traffic("fio: a warning\n" + json.dumps({"jobs": [job]}))
    assert (traffic.requests, traffic.size, traffic.seconds, traffic.percentiles) == (1000, 4096000, 0.5, (1, 2, 3))
    assert traffic.cpu == pytest.approx(0.8)  # 40 % of the 2 s that its jobs ran for


def test_a_run_of_fio_that_did_nothing_is_no_measurement() -> None:
    with pytest.raises(StepError, match="--seconds"):
        fio_traffic(json.dumps({"jobs": [{"mixed": {"total_ios": 0}}]}))


@pytest.mark.parametrize(
    "said",
    [
        "\r\\-x : 1 -> 1 (2.1), 600.0 MB/s ,2300.0 MB/s\r|-x : 1 -> 1 (2.1), 704.1 MB/s ,2869.2 MB/s\r 1#x",
        "\r 3#x : 1 -> 1 (x2.9),  700.0 MB/s\r 3#x : 1 -> 1 (x2.9),  704.1 MB/s, 2869.2 MB/s \n",
    ],
    ids=["lz4 -b", "zstd -b"],
)
def test_the_speed_of_a_codec_is_the_last_that_its_program_shows(said: str) -> None:
    assert bare_speeds(said) == (704.1, 2869.2)


def test_a_codec_that_shows_no_speed_has_none() -> None:
    assert bare_speeds("lz4: no such file") is None


@pytest.mark.parametrize(
    ("bound", "at_least", "measured", "verdict"),
    [
        (1.0, True, 1.0, "reached"),
        (1.0, True, 0.99, "NOT reached"),
        (1.1, False, 1.0, "reached"),
        (1.1, False, 1.2, "NOT reached"),
        (None, False, 1.2, ""),
        (1.0, True, None, "not measured in this run"),
    ],
)
def test_an_expectation_is_reached_or_not_or_not_measured(
    bound: float | None, at_least: bool, measured: float | None, verdict: str
) -> None:
    assert Expectation("x", bound, at_least, spread([measured])).verdict == verdict


@pytest.mark.parametrize(
    ("kind", "values", "grown"),
    [
        (Growth.STAYS, [2.0, 1.0, 3.0], (1.5, 2)),
        (Growth.DOES_NOT_FALL, [2.0, 1.0, 3.0], (2.0, 1)),
        (Growth.WITH_THE_WORK, [1.0, 2.0, 3.0], (1.0, 2)),
        (Growth.WITH_THE_WORK, [1.0, 2.0, 5.0], (2.0, 2)),
        (Growth.ANY, [1.0, 2.0, 3.0], None),
        (Growth.STAYS, [0.0, 1.0, 2.0], None),
    ],
)
def test_growth_is_more_than_a_figure_may_grow(
    kind: Growth, values: list[float], grown: tuple[float, int] | None
) -> None:
    assert growth([0.0, 1.0, 2.0], values, kind) == grown


def test_a_device_is_laid_out_in_whole_mib() -> None:
    assert parse_disk_size("1G") == 1 << 30
    for text in ("63M", "64.5M", "1000000000"):
        with pytest.raises(ValueError, match="not a whole number of MiB"):
            parse_disk_size(text)
