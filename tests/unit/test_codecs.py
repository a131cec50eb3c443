import os
import random

import pytest

from zramd.device import codecs
from zramd.device.codecs import Codec, CodecError, codec, parse_codec
from zramd.layout import PAGE_SIZE


def sample_pages() -> list[bytes]:
    generator = random.Random(7)
    text = (b"the quick brown fox jumps over the lazy dog; " * 100)[:PAGE_SIZE]
    half = generator.randbytes(PAGE_SIZE // 2) + bytes(PAGE_SIZE // 2)
    with open(os.__file__, "rb") as source:
        code = source.read(PAGE_SIZE)
    return [bytes(PAGE_SIZE), text, half, generator.randbytes(PAGE_SIZE), code]


def round_trip(chosen: Codec, page: bytes) -> bytes:
    """Compress and decompress a page that does not lie at the start of its buffer."""
    compress = chosen.compressor(bytearray(b"before" + page + b"after"))
    return chosen.decompressor()(memoryview(compress(6)))


@pytest.mark.parametrize("name", codecs.NAMES)
@pytest.mark.parametrize("page", sample_pages(), ids=["zero", "text", "half", "random", "code"])
def test_a_page_comes_back(name: str, page: bytes) -> None:
    chosen = codec(name)
    assert round_trip(chosen, page) == page


@pytest.mark.parametrize("page", sample_pages(), ids=["zero", "text", "half", "random", "code"])
def test_lz4_works_without_the_one_shot_call(page: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZRAMD_ENGINE", "python")
    monkeypatch.setattr(codecs, "_one_shot", lambda: None)
    assert codecs.lz4_implementation() == "streaming"
    chosen = codec("lz4")
    assert round_trip(chosen, page) == page


def test_lz4_compresses_by_the_one_shot_call_that_the_kernel_makes() -> None:
    assert codecs.lz4_implementation() == "one-shot"


@pytest.mark.parametrize("name", codecs.NAMES)
@pytest.mark.parametrize("length", [0, 10, PAGE_SIZE])
def test_damaged_data_are_an_error(name: str, length: int) -> None:
    with pytest.raises(CodecError):
        codec(name).decompressor()(memoryview(bytes([0xFF]) * length))


@pytest.mark.parametrize("name", codecs.NAMES)
def test_less_than_a_page_is_an_error(name: str) -> None:
    if name == "zstd":
        import zstandard

        short = zstandard.ZstdCompressor().compress(b"short")
    else:
        import lz4.block

        short = lz4.block.compress(b"short", store_size=False)
    with pytest.raises(CodecError):
        codec(name).decompressor()(memoryview(short))


def test_a_higher_zstd_level_compresses_better() -> None:
    page = sample_pages()[4]
    fast, best = (codec("zstd", level).compressor(bytearray(page)) for level in (-5, 19))
    assert len(best(0)) < len(fast(0))


@pytest.mark.parametrize(
    ("text", "name", "level"),
    [
        ("lz4", "lz4", 1),
        ("zstd", "zstd", 3),
        ("lz4hc", "lz4hc", 9),
        ("zstd(level=9)", "zstd", 9),
        ("zstd( level = -3 )", "zstd", -3),
    ],
)
def test_a_codec_is_named_as_zram_generator_names_it(text: str, name: str, level: int) -> None:
    chosen = parse_codec(text)
    assert (chosen.name, chosen.level) == (name, level)


@pytest.mark.parametrize(
    "text", ["", "gzip", "zstd:9", "zstd(level=99)", "lz4hc(level=0)", "lz4(level=99999999999)", "zstd(9)"]
)
def test_what_names_no_codec_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"algorithm|levels"):
        parse_codec(text)
