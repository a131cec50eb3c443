"""What the administrator has set up: configuration, units, other programs of this name, and tools to attach with."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from zramd.doctor.finding import Finding, ok, problem
from zramd.doctor.kernel import has_nbd
from zramd.doctor.machine import Answer, Machine, Planned
from zramd.paths import CONFIGURATIONS
from zramd.status.client import NOBODY_LISTENS

UNITS = ("etc/systemd/system", "run/systemd/system", "usr/lib/systemd/system", "lib/systemd/system")
"""Where systemd looks, the first first."""
STARTING = ("zramd@.service", "zramd-attach@.service", "zramd-swap@.service")
"""Our units that start this program."""
PROGRAMS = ("usr/local/bin", "usr/bin", "bin", "usr/local/sbin", "usr/sbin")
ELF = b"\x7fELF"
NBD_TOOLS = {"modprobe": "kmod", "mkswap": "util-linux", "swapon": "mount", "wipefs": "util-linux"}
FUSE_TOOLS = {"nbdfuse": "libnbd-bin", "fusermount3": "fuse3", "losetup": "mount"}
"""What `zramd attach` and `swapon` run, and the packages of Debian that have it."""


def examine(machine: Machine, answers: Iterable[Answer]) -> Iterator[Finding]:
    """Yield what is found, but for the configuration."""
    yield _names(machine)
    yield from _units(machine)
    yield from _sockets(answers)
    yield _tools(machine)


def configuration(machine: Machine) -> tuple[list[Finding], list[Planned]]:
    """Return what is found in the files, and the disks that they have."""
    findings: list[Finding] = []
    disks: list[Planned] = []
    places = [machine.root / directory for directory in CONFIGURATIONS]
    files = {path.name for place in places for path in place.glob("*.toml")}
    drop_ins = {path.parent.name.removesuffix(".d") for place in places for path in place.glob("*.toml.d/*.toml")}
    for name in sorted(files | drop_ins):
        # Only where there is one: it imports most of the server.
        from zramd.config import ConfigError, find, load

        if (path := find(name, machine.root)) is None:
            continue  # its drop-ins are masked
        try:
            settings = load(path, root=machine.root)
        except (ConfigError, OSError) as error:
            findings.append(problem("config", str(error), f"zramd config check {path} tries it again"))
            continue
        left_out = f", without {', '.join(settings.left_out)} on a machine of this size" if settings.left_out else ""
        disks_of_it = ", ".join(disk.name for disk in settings.disks) or "no disk"
        findings.append(ok("config", f"{path} has {disks_of_it}{left_out}"))
        for disk in settings.disks:
            size = disk.wanted.disksize
            if size is not None:
                disks.append(Planned(disk.name, size, disk.mem_limit or 0, 0, disk.state, settings.swap))
    return findings or [ok("config", "there is none: the defaults hold")], disks


def _names(machine: Machine) -> Finding:
    """Look for the Go program called zramd, which configures the kernel's zram at boot."""
    for directory in PROGRAMS:
        path = Path("/", directory, "zramd")
        if _is_elf(machine.root / directory / "zramd"):
            remedy = "remove that package, or call this one by its path"
            return problem("name", f"{path} is another program, which configures the kernel's zram", remedy)
    for directory in UNITS:
        if re.search(r"^ExecStart=.*\bzramd start\b", machine.read(f"{directory}/zramd.service"), re.MULTILINE):
            remedy = "systemctl disable --now zramd.service"
            return problem("name", f"/{directory}/zramd.service configures the kernel's zram at boot", remedy)
    return ok("name", "no other program is called zramd")


def _is_elf(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(ELF)) == ELF
    except OSError:
        return False


def _units(machine: Machine) -> Iterator[Finding]:
    """Look whether the units that are installed start this program."""
    found = [name for name in STARTING if _unit(machine, name)]
    for name in found:
        directory, text = _unit(machine, name) or ("", "")
        match = re.search(r"^ExecStart=[-+!:@]*(\S+)", text, re.MULTILINE)
        program = match[1] if match else ""
        if Path(program).name != "zramd":
            text = f"/{directory}/{name} starts {program or 'nothing'}, and is not of this zramd"
            yield problem("units", text, "remove it, or install the one in systemd/")
            return
        real = Path(machine.root, program.lstrip("/")).resolve()
        if real.is_relative_to("/root") or real.is_relative_to("/home"):
            install = "python3 -m venv /opt/zramd && /opt/zramd/bin/pip install '.[top]'"
            remedy = f"in the checkout: {install} && ln -sf /opt/zramd/bin/zramd {program}"
            yield problem("units", f"{program} is {real}, which units cannot see (ProtectHome=yes)", remedy)
            return
        if not machine.exists(program.lstrip("/")):
            remedy = f'link it: ln -s "$(command -v zramd)" {program}'
            yield problem("units", f"/{directory}/{name} starts {program}, which is not there", remedy)
            return
    yield ok("units", f"installed: {' '.join(found)}" if found else "none are installed")


def _unit(machine: Machine, name: str) -> tuple[str, str] | None:
    for directory in UNITS:
        if machine.exists(f"{directory}/{name}"):
            return directory, machine.read(f"{directory}/{name}")
    return None


def _sockets(answers: Iterable[Answer]) -> Iterator[Finding]:
    answers = list(answers)
    for answer in answers:
        if answer.facts is not None:
            yield ok("server", f"{answer.facts.get('name', '?')} answers at {answer.path}")
        elif NOBODY_LISTENS in answer.error:
            yield ok("server", f"none any more at {answer.path}; the next one takes its place")
        else:
            remedy = "stop what listens there (ss -xlp), or give zramd another socket with --status"
            yield problem("server", answer.error, remedy)
    if not answers:
        yield ok("server", "none is running")


def _tools(machine: Machine) -> Finding:
    nbd = has_nbd(machine)
    wanted = NBD_TOOLS if nbd else FUSE_TOOLS
    missing = {name: package for name, package in wanted.items() if not machine.tool(name)}
    how = "/dev/nbdN" if nbd else "--fuse"
    if missing:
        packages = " ".join(dict.fromkeys(missing.values()))
        return problem("tools", f"to attach ({how}) there is no {', '.join(missing)}", f"apt-get install {packages}")
    if not nbd and not machine.exists("dev/fuse"):
        return problem("tools", "there is no /dev/fuse to attach with", "modprobe fuse, or let the container have it")
    return ok("tools", f"all there to attach by {how}")
