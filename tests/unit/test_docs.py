"""What docs/ says of names, numbers and log lines is so in the source."""

import re
from enum import IntEnum, IntFlag
from pathlib import Path

import pytest

from zramd.nbd import protocol

ROOT = Path(__file__).parents[2]
DOCS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
TABLES: dict[str, type[IntEnum] | type[IntFlag]] = {
    "Handshake flags": protocol.HandshakeFlag,
    "Options": protocol.Option,
    "Option replies": protocol.OptionReply,
    "Information": protocol.Info,
    "Transmission flags": protocol.TransmissionFlag,
    "Commands": protocol.Command,
    "Command flags": protocol.CommandFlag,
    "Chunks": protocol.Chunk,
    "Errors": protocol.Error,
}


def table(section: str) -> list[list[str]]:
    """Return the cells of a section's table in protocol.md."""
    text = (ROOT / "docs/protocol.md").read_text()
    body = re.search(rf"^## {section}$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert body is not None
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\| `.*\|$", body[1], re.M)]


@pytest.mark.parametrize("section", TABLES)
def test_the_protocols_tables_are_those_of_the_source(section: str) -> None:
    kind = TABLES[section]
    known: dict[str, int] = {}
    unknown: dict[str, int] = {}
    for name, number, answer, _ in table(section):
        power, _, rest = number.partition(" + ")
        value = (1 << int(power.removeprefix("2^"))) + int(rest) if rest else int(number)
        (known if answer == "yes" else unknown)[name.strip("`")] = 1 << value if issubclass(kind, IntFlag) else value
    assert known == {member.name: int(member) for member in kind}
    assert not set(unknown.values()) & set(known.values())


def test_a_log_line_that_is_explained_is_one_that_is_logged() -> None:
    source = " ".join(path.read_text() for path in sorted((ROOT / "zramd").rglob("*.py")))
    source = re.sub(r'"\s*f?"', "", source)  # texts that go over the end of a line
    section = (ROOT / "docs/operations.md").read_text().partition("## The log")[2]
    lines = [line for cells in re.findall(r"^\| (`.*?) \|", section, re.M) for line in re.findall("`(.*?)`", cells)]
    assert len(lines) > 15
    for line in lines:
        parts = re.split(r"\.\.\.|/dev/nbd0|\d[\d.]*|SIGKILL|\(nbd\)", line)
        longest = max((part.strip(" ,:()") for part in parts), key=len)
        assert longest in source, line


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_links_lead_to_files(path: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:]+)(?:#([^)]*))?\)", path.read_text()):
        assert (path.parent / target).exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", (path.parent / target).read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
