import pytest

from zramd.nbd.identity import MAX_DESCRIPTION, add_uuid, find_uuid, is_uuid

UUID = "0f3c9a52-6d1b-4f0e-9c55-3a1f6f2f7a10"


@pytest.mark.parametrize("description", ["", "a disk", "zwölf, UUID x", f"UUID {UUID}", "x" * MAX_DESCRIPTION])
def test_a_uuid_is_found_in_the_description_it_was_added_to(description: str) -> None:
    whole = add_uuid(description, UUID)
    assert whole.startswith(description)
    assert find_uuid(whole) == UUID
    assert len(whole.encode()) <= 4096


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a disk",
        UUID,
        f"a disk {UUID}",
        f"a disk, UUID {UUID} ",
        f"a disk, UUID {UUID[:-1]}",
        f"a disk, UUID {UUID}0",
        f"a disk, UUID {UUID.upper()}",
        f"a disk, UUID {UUID.replace('-', '0')}",
        f"a disk, UUID {UUID.replace('0', '²')}",
    ],
)
def test_any_other_description_has_none(text: str) -> None:
    assert find_uuid(text) is None


@pytest.mark.parametrize("text", ["", "zram0", UUID + "\n", " " + UUID[1:], UUID[:-1] + "-", "-" * 36])
def test_what_is_no_uuid_is_taken_for_a_name(text: str) -> None:
    assert not is_uuid(text)
