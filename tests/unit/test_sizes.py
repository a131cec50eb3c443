import pytest

from zramd.sizes import format_size, memparse, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("1K", 1024),
        ("512M", 512 << 20),
        ("1G", 1 << 30),
        ("1.5GiB", 3 << 29),
        ("2tib", 2 << 40),
    ],
)
def test_sizes_are_of_1024(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1", "1X", "1KB", "1 2", "0x10", "1e3", "\uff11"])
def test_what_is_not_a_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [("0x1000", 4096), ("010000", 4096), ("1.5M", 1), ("2Mjunk", 2 << 20), ("0", 0), ("5000\n", 5000), ("1k", 1024)],
)
def test_memparse_reads_what_the_kernel_reads(text: str, size: int) -> None:
    assert memparse(text) == size


@pytest.mark.parametrize("text", ["", "junk", "-4096", "K"])
def test_memparse_needs_a_number(text: str) -> None:
    with pytest.raises(ValueError, match="does not start with a number"):
        memparse(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0B"),
        (1023, "1023B"),
        (1024, "1K"),
        (1536, "1.5K"),
        (904 << 20, "904M"),
        ((1 << 30) - 1, "1G"),
        (1 << 60, "1E"),
    ],
)
def test_sizes_print_as_zramctl_prints_them(size: int, text: str) -> None:
    assert format_size(size) == text
