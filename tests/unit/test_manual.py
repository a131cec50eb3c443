"""Man pages and completions, which are made of the commands' help, and that help needs next to nothing imported."""

import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from zramd.cli import load_verbs, main
from zramd.cli.completion import SHELLS, script
from zramd.cli.manual import COMPLETIONS, pages, write

HEAVY = (
    *("asyncio", "base64", "cryptography", "dataclasses", "email", "http", "logging", "lz4", "rich", "socketserver"),
    *("ssl", "subprocess", "tomllib", "xxhash", "zstandard", "zramd.daemon", "zramd.device", "zramd.native"),
    "zramd.zsmalloc",
)
"""Of what is imported, what takes the most time; a client verb has no use for it."""
CLIENT_VERBS = ("status", "stat", "set", "compact", "idle", "grow", "reset", "stop", "policy", "recompress", "doctor")


def test_every_verb_has_a_page_with_its_options_and_an_example() -> None:
    made = dict(pages())
    verbs = load_verbs()
    assert set(made) == {"zramd", *(f"zramd-{name}" for name in verbs)}
    for name, verb in verbs.items():
        page = made[f"zramd-{name}"].replace("\\-", "-")
        assert f".B zramd-{name}(1)\n" in made["zramd"].replace("\\-", "-")
        options = [option for each in verb.params if isinstance(each, click.Option) for option in each.opts]
        assert all(option in page for option in options)
        example = page.partition(".SH EXAMPLES\n")[2]
        assert f"zramd {name}" in example


def test_troff_has_nothing_to_say_of_any_page(tmp_path: Path) -> None:
    if shutil.which("groff") is None:
        pytest.skip("groff is not installed: apt-get install groff-base")
    write(tmp_path)
    made = sorted((tmp_path / "share/man/man1").iterdir())
    done = subprocess.run(["groff", "-ww", "-man", "-Tutf8", "-P-cbou", *made], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    # What troff did not take as it stands is missing from what it shows.
    assert 'zramd bench --pid "$(pgrep -n firefox)" --memory 4G' in done.stdout
    assert "zramd serve --size 4G --algorithm 'zstd(level=3)' --mem-limit 1G" in done.stdout


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_takes_its_completion(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed: apt-get install {shell}")
    write(tmp_path)
    path = tmp_path / COMPLETIONS[shell]
    assert CliRunner().invoke(main, ["completion", shell]).output == path.read_text() == script(shell)
    done = subprocess.run([shell, "-n", path], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("zramd re", ["recompress", "restore", "reset"]),
        ("zramd recompress --type huge", ["huge", "huge_idle"]),
        ("zramd stat mm", ["mm_stat"]),
        ("zramd status z", ["zram0"]),
        ("zramd set mem", ["mem_limit=", "mem_used_max="]),
        ("zramd stat --status /run/zramd/", ["/run/zramd/zram0.status"]),
    ],
)
def test_completion_knows_verbs_values_and_what_a_server_has(
    typed: str, completed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = "mm_stat\nmem_limit\nmem_limit VALUE\nmem_used_max VALUE\n"
    monkeypatch.setattr("zramd.cli.completion.find_disk", lambda suffix: Path(f"/run/zramd/zram0{suffix}"))
    monkeypatch.setattr("zramd.cli.completion.ask", lambda *_: answer)
    monkeypatch.setattr("zramd.cli.completion.server_sockets", lambda suffix: [Path(f"/run/zramd/zram0{suffix}")])
    words = typed.split()
    environment = {"_ZRAMD_COMPLETE": "bash_complete", "COMP_WORDS": typed, "COMP_CWORD": str(len(words) - 1)}
    result = CliRunner().invoke(main, [], env=environment, prog_name="zramd", complete_var="_ZRAMD_COMPLETE")
    assert result.output.splitlines() == [f"plain,{word}" for word in completed]


def test_help_and_client_verbs_import_nothing_heavy() -> None:
    code = f"""
import contextlib, io, sys
before = set(sys.modules)
from zramd.cli import main
with contextlib.redirect_stdout(io.StringIO()):
    for arguments in [["--help"], *([verb, "--help"] for verb in {CLIENT_VERBS!r})]:
        main(arguments, standalone_mode=False)
print(*sorted(name for name in set(sys.modules) - before if name.startswith({HEAVY!r})))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("\n", "")


def test_man_pages_can_be_made_where_only_click_is_installed(tmp_path: Path) -> None:
    code = f"""
import sys
for name in ("cryptography", "lz4", "lz4.block", "rich", "xxhash", "zstandard"):
    sys.modules[name] = None
from pathlib import Path
from zramd.cli.manual import write
write(Path({str(tmp_path)!r}))
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "share/man/man1/zramd-serve.1").exists()
