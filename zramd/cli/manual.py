"""Man pages and completions as files, made of the commands' own help: `python -m zramd.cli.manual DIRECTORY`.

The directory gets what belongs under /usr or /usr/local: share/man/man1 and the places where shells look.
"""

import inspect
import os
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import click

from zramd import __version__
from zramd.cli import load_verbs, main
from zramd.cli.completion import PROGRAM, script

COMPLETIONS = {
    "bash": "share/bash-completion/completions/zramd",
    "zsh": "share/zsh/site-functions/_zramd",
    "fish": "share/fish/vendor_completions.d/zramd.fish",
}
WIDTH = 78
"""Of a line of source; what is filled has another on a terminal."""
AS_IT_STANDS = "\b\n"
"""What a paragraph starts with whose lines are kept, as click has it."""
FILES = {
    "/run/zramd, $XDG_RUNTIME_DIR/zramd": "The sockets of the disks that root, or another user, serves, and what these "
    "disks hold if that is a tmpfs; /dev/shm otherwise.",
    "/etc/zramd/zramd.toml, /etc/zramd/zramd.toml.d/*.toml": "The configuration of a server, and what replaces its "
    "keys one by one. NAME.toml beside it is for a server of one disk.",
}
ENVIRONMENT = {
    "ZRAMD_ENGINE": "python or native: which engine runs the hot path. Default: the compiled one, if it was built.",
}
STATUSES = {
    "0": "It is done.",
    "1": "It failed; one line on standard error says why, and what to do about it.",
    "2": "The command was wrong.",
    "3": "No server runs (status and top).",
    "130": "Ctrl-C has ended it.",
}


def pages() -> Iterator[tuple[str, str]]:
    """Yield the name of each page and its text: one for the command, and one for each verb."""
    verbs = load_verbs()
    context = click.Context(main, info_name=PROGRAM, **main.context_settings)
    listed = {f"{PROGRAM}-{name}(1)": main.get_command(context, name) for name in verbs}
    sections = [
        ("COMMANDS", _items({name: _short(command) for name, command in listed.items() if command})),
        ("FILES", _items(FILES)),
        ("ENVIRONMENT", _items(ENVIRONMENT)),
        ("EXIT STATUS", _items(STATUSES)),
        ("SEE ALSO", _see(["nbdinfo", "zramctl"])),
    ]
    yield PROGRAM, _page(PROGRAM, "a compressed block device in memory, over NBD", context, sections)
    for name, verb in verbs.items():
        child = click.Context(verb, info_name=name, parent=context)
        short = _short(main.get_command(context, name))
        yield f"{PROGRAM}-{name}", _page(f"{PROGRAM}-{name}", short, child, [("SEE ALSO", _see([PROGRAM]))])


def _short(command: click.Command | None) -> str:
    text = (command.help or "") if command else ""
    return text.rstrip(".")


def _page(name: str, short: str, context: click.Context, sections: list[tuple[str, list[str]]]) -> str:
    command = context.command
    usage = " ".join(command.collect_usage_pieces(context))
    date = time.strftime("%Y-%m-%d", time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))))
    short = short[0].lower() + short[1:]
    described, example = _description(command.help or "")
    lines = [
        f'.TH {_escape(name.upper())} 1 {date} "zramd {__version__}"',
        *(".SH NAME", f"{_escape(name)} \\- {_escape(short)}"),
        *(".SH SYNOPSIS", f".B {_escape(context.command_path)}", *_fill(usage)),
        *(".SH DESCRIPTION", *described),
    ]
    records = [parameter.get_help_record(context) for parameter in command.get_params(context)]
    if options := {record[0]: record[1] for record in records if record and record[1]}:
        lines += [".SH OPTIONS", *_items(options)]
    for title, text in [("EXAMPLES", example), *sections]:
        if text:
            lines += [f".SH {title}", *text]
    return "\n".join(lines) + "\n"


def _description(text: str) -> tuple[list[str], list[str]]:
    """Return the description in a command's help, and its example."""
    described: list[str] = []
    example: list[str] = []
    for number, paragraph in enumerate(inspect.cleandoc(text).split("\n\n")):
        between = [".PP"] if number else []
        if not paragraph.startswith(AS_IT_STANDS):
            described += [*between, *_fill(paragraph)]
            continue
        first, _, rest = paragraph.removeprefix(AS_IT_STANDS).partition("\n")
        if first == "Example:":
            example = _verbatim(rest)
        elif first.endswith(":"):
            example = [*_fill(first), ".PP", *_verbatim(rest)]
        else:
            described += [*between, *_verbatim(f"{first}\n{rest}")]
    return described, example


def _items(items: dict[str, str]) -> list[str]:
    lines = []
    for name, text in items.items():
        lines += [".TP", f".B {_escape(name)}", *_fill(text)]
    return lines


def _see(names: list[str]) -> list[str]:
    return [f".BR {_escape(name)} (1){',' * (name != names[-1])}" for name in names]


def _verbatim(text: str) -> list[str]:
    return [".nf", ".RS 4", *(_protect(_escape(line)) for line in textwrap.dedent(text).splitlines()), ".RE", ".fi"]


def _fill(text: str) -> list[str]:
    """Return lines that are filled again when the page is shown."""
    words, lines = [_escape(word) for word in text.split()], [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + len(word) >= WIDTH:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return [_protect(line) for line in lines]


def _escape(line: str) -> str:
    """Return text as troff reads it, without escapes, and with hyphens that can be copied as minus."""
    line = line.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq").replace("`", "\\(ga")
    return line.replace("^", "\\(ha").replace("~", "\\(ti")


def _protect(line: str) -> str:
    """Return a line that is no request."""
    return f"\\&{line}" if line.startswith(".") else line


def write(directory: Path) -> dict[str, list[str]]:
    """Write all files below a directory. Return them by the directory that they belong in, relative to the prefix."""
    texts = {f"share/man/man1/{name}.1": text for name, text in pages()}
    texts |= {path: script(shell) for shell, path in COMPLETIONS.items()}
    written: dict[str, list[str]] = {}
    for name, text in texts.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        written.setdefault(str(Path(name).parent), []).append(str(path))
    return written


if __name__ == "__main__":
    write(Path(sys.argv[1]))
