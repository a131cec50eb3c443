import pytest

from zramd.zsmalloc.classes import FitRule, chain_pages, fullness_group, geometry

CHAINS = range(4, 17)
WATERMARKS = [3264, 3408, 3504, 3584, 3632, 3680, 3712, 3744, 3776, 3792, 3808, 3840, 3840]
BEST_USAGE = [69, 86, 93, 112, 123, 140, 143, 159, 164, 180, 183, 188, 191]
LEAST_WASTE = [69, 86, 94, 110, 119, 136, 141, 153, 159, 173, 179, 186, 192]


@pytest.mark.parametrize(("chain_size", "classes", "watermark"), list(zip(CHAINS, BEST_USAGE, WATERMARKS, strict=True)))
def test_best_usage_gives_the_table_of_the_zsmalloc_document(chain_size: int, classes: int, watermark: int) -> None:
    pool = geometry(chain_size, FitRule.BEST_USAGE)
    assert (len(pool.kept()), pool.watermark) == (classes, watermark)


@pytest.mark.parametrize(
    ("chain_size", "classes", "watermark"), list(zip(CHAINS, LEAST_WASTE, WATERMARKS, strict=True))
)
def test_least_waste_gives_the_classes_of_current_kernels(chain_size: int, classes: int, watermark: int) -> None:
    pool = geometry(chain_size)
    assert (len(pool.kept()), pool.watermark) == (classes, watermark)


def test_the_rules_differ_at_chain_size_8_for_the_sizes_known_to() -> None:
    sizes = range(32, 4097, 16)
    differing = [s for s in sizes if chain_pages(s, 8, FitRule.LEAST_WASTE) != chain_pages(s, 8, FitRule.BEST_USAGE)]
    assert differing == [144, 208, 304, 352, 416, 432, 464, 560, 592, 688, 752, 1056, 1392, 1408, 1424, 2096]


@pytest.mark.parametrize(
    ("length", "size"),
    [(1, 32), (24, 32), (25, 48), (40, 48), (3576, 3584), (3577, 3632), (3624, 3632), (3625, 4096), (4096, 4096)],
)
def test_a_payload_gets_the_class_with_room_for_it_and_its_header(length: int, size: int) -> None:
    assert geometry().class_of[length].size == size


def test_pages_of_3625_bytes_and_more_are_huge_at_chain_size_8() -> None:
    assert geometry().huge_limit == 3625


@pytest.mark.parametrize("rule", FitRule)
@pytest.mark.parametrize("chain_size", CHAINS)
def test_every_payload_fits_its_class_and_no_object_index_overflows(chain_size: int, rule: FitRule) -> None:
    pool = geometry(chain_size, rule)
    for length in range(1, 4097):
        size_class = pool.class_of[length]
        assert length + size_class.header <= size_class.size
        assert size_class.objects * size_class.size <= size_class.zspage_bytes
        assert 1 <= size_class.pages <= chain_size
        assert size_class.objects <= 256


@pytest.mark.parametrize("chain_size", [0, 3, 17])
def test_other_chain_sizes_are_refused(chain_size: int) -> None:
    with pytest.raises(ValueError, match="chain size"):
        geometry(chain_size)


@pytest.mark.parametrize(
    ("used", "objects", "group"),
    [(0, 9, 0), (1, 128, 1), (12, 128, 1), (13, 128, 2), (5, 10, 6), (127, 128, 10), (128, 128, 11), (1, 1, 11)],
)
def test_fullness_groups_are_tenths(used: int, objects: int, group: int) -> None:
    assert fullness_group(used, objects) == group
