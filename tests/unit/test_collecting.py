"""Pages of files as `zramd bench` chooses them, and what it tells of them."""

import errno
import json
import os
from io import BytesIO
from pathlib import Path

import pytest
from click.testing import CliRunner

from zramd.cli import main
from zramd.cli.table import bar
from zramd.device.collecting import collect, collect_stream, find, memory_of
from zramd.layout import PAGE_SIZE

ZERO, SAME = bytes(PAGE_SIZE), b"8 bytes." * (PAGE_SIZE // 8)


def page(number: int) -> bytes:
    """Return a page that is like no other, and compresses to little."""
    return f"page {number} ".encode().ljust(64, b".") * (PAGE_SIZE // 128) + bytes(PAGE_SIZE // 2)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Make a directory with a file of 40 pages of which 20 are a hole, and one that ends in the middle of a page."""
    with (tmp_path / "sparse").open("wb") as file:
        file.write(ZERO * 4 + SAME * 6 + b"".join(map(page, range(10))))
        file.truncate(40 * PAGE_SIZE)
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "short").write_bytes(page(10) + page(11)[:100])
    (tmp_path / "link").symlink_to("sparse")
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


def test_every_page_of_files_is_counted_and_those_that_differ_are_kept(data: Path) -> None:
    found = find([data])
    assert (found.pages, found.holes, found.skipped) == (42, 20, [])
    collected = collect(found, 100)
    assert (collected.total, collected.read, collected.zeros, collected.same) == (42, 22, 24, 6)
    assert collected.objects == 12
    assert sorted(collected.pages) == sorted([*map(page, range(11)), page(11)[:100].ljust(PAGE_SIZE, b"\0")])


def test_of_many_pages_some_are_read_and_each_has_the_same_chance(tmp_path: Path) -> None:
    count, wanted = 4000, 50
    (tmp_path / "file").write_bytes(b"".join(map(page, range(count))))
    chosen = [int(text.split()[1]) for _ in range(4) for text in collect(find([tmp_path / "file"]), wanted).pages]
    assert len(chosen) == 4 * wanted
    # 200 numbers up to 4000: none of the quarters is left out by chance.
    assert {number * 4 // count for number in chosen} == {0, 1, 2, 3}
    collected = collect(find([tmp_path / "file"]), wanted)
    assert collected.read == 8 * wanted
    assert collected.objects == count


def test_a_stream_is_counted_to_its_end() -> None:
    stream = BytesIO(ZERO * 3 + SAME * 2 + b"".join(map(page, range(100))) + b"x")
    collected = collect_stream(stream, 10)
    assert (collected.total, collected.zeros, collected.same, collected.objects) == (106, 3, 2, 101)
    assert len(set(collected.pages)) == 10


def test_the_memory_of_a_process_is_what_it_has_written() -> None:
    kept = bytearray(b"".join(map(page, range(512))))
    try:
        extents = list(memory_of(os.getpid()))
    except PermissionError as error:
        pytest.skip(f"{error.filename} cannot be read here: run as root, outside of a container")
    assert sum(extent.pages for extent in extents) >= len(kept) // PAGE_SIZE
    assert collect(find([], [os.getpid()]), 8).pages


def test_bench_draws_a_row_for_each_algorithm_with_what_is_held_and_what_it_takes(data: Path) -> None:
    result = CliRunner().invoke(main, ["bench", str(data), "--algorithm", "lz4", "--algorithm", "zstd(level=19)"])
    assert result.exit_code == 0
    heading, *rows, summary = result.output.splitlines()
    assert heading.split() == ["ALGORITHM", "RATIO", "COMPR", "DECOMPR", "MEM/4", "MEM/8", "SWAP"]
    assert [row.split()[:2] for row in rows] == [["lz4", "1"], ["zstd", "19"]]
    assert all(bar(0, 8) in row for row in rows)  # a page or two of 42
    assert summary.startswith("168K of data: 57.1% zeros, 14.3% same-filled; 12 pages tried; SWAP is what ")


def test_a_bar_is_as_full_as_the_share_and_never_longer() -> None:
    assert [bar(share, 8) for share in (0, 0.25, 1, 1.1)] == ["........", "##......", "########", "########"]


def test_bench_as_json_has_everything_and_says_what_it_could_not_read(data: Path) -> None:
    result = CliRunner().invoke(main, ["bench", str(data), "--json", "--memory", "1G", "--algorithm", "lz4"])
    facts = json.loads(result.output)
    assert facts["pages"] == {"total": 42, "holes": 20, "read": 22, "zero": 4, "same": 6, "objects": 12}
    (row,) = facts["rows"]
    # 1 GiB holds more of it than there is memory: the 12 pages compress well, and the others take a word or two.
    assert row["memory"]["8"] < 12 * PAGE_SIZE / 4
    assert row["swap"] == int((1 << 30) / (row["per_object"]["8"] * 12 / 42 + 12)) * PAGE_SIZE


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ([], 2, "nothing to try: name files"),
        (["-", "x"], 2, "- stands alone"),
        (["nowhere"], 1, "nowhere: No such file or directory"),
        (["empty"], 1, "there is no data"),
        (["zeros"], 1, "100.0% zeros"),
        (["pipe"], 1, "it is no file and no disk"),
        (["zeros", "--algorithm", "lzo"], 2, "lzo"),
        (["--pid", "999999999"], 1, "No such file or directory"),
    ],
)
def test_what_bench_cannot_try_is_one_line(
    arguments: list[str], status: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").touch()
    (tmp_path / "zeros").write_bytes(ZERO)
    os.mkfifo(tmp_path / "pipe")
    result = CliRunner().invoke(main, ["bench", *arguments])
    assert result.exit_code == status
    assert said in result.output.splitlines()[-1]


def test_what_is_below_a_directory_and_unreadable_is_left_out_and_named(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really_open = os.open

    def refuse(path: str, flags: int) -> int:
        if path.endswith("short"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return really_open(path, flags)

    monkeypatch.setattr(os, "open", refuse)  # root may read everything
    result = CliRunner().invoke(main, ["bench", str(data), "--algorithm", "lz4"])
    assert result.exit_code == 0
    assert result.stderr == f"Not read: {data}/below/short: Permission denied.\n"
