"""What a virtual machine boots from: Debian's kernels, an initramfs, a disk with Debian and one with zramd.

All of it is kept in build/vm. The disk with Debian is made once (two minutes), that with zramd when a source file has
changed (ten seconds); a third, the payload, is made for each run and holds what the run needs.
"""

import hashlib
import lzma
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from harness import StepError

ROOT = Path(__file__).resolve().parent.parent
GUEST = ROOT / "scripts" / "guest"
BUILD = ROOT / "build" / "vm"
MIRROR = "http://deb.debian.org/debian"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
RELEASE = "bookworm"
PACKAGES = (
    "python3",
    "python3-venv",
    "systemd",
    "systemd-sysv",
    "dbus",
    "udev",
    "kmod",
    "util-linux",
    "mount",
    "iproute2",
    "e2fsprogs",
    "procps",
    "nbd-client",
    "liblz4-1",
    "libzstd1",
)
KERNELS = {"6.1": "bookworm", "6.12": "trixie"}
"""Debian's kernels by their version, and the release that each is of."""
MODULES = (
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "virtio_rng",
    "ext4",
    "lzo_rle",
    "lz4",
    "zstd",
    "nbd",
    "zram",
    "loop",
)
PREFIX = Path("opt/zramd")
"""Where zramd is in the guest, relative to its root."""
DISK_SIZES = {"root": "1500M", "payload": "400M"}


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel that can be booted: its image, and the directory with the modules that are needed."""

    release: str
    image: Path
    modules: Path


def run(*command: str | Path, **variables: str) -> str:
    """Run a program and return what it printed; the variables are added to its environment.

    Raises:
        StepError: it failed, or is not there.
    """
    # What pip and apt read from the environment is meant for the host.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    try:
        done = subprocess.run(
            list(map(str, command)), env=kept | variables, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
    except FileNotFoundError:
        raise StepError(f"there is no program {command[0]}: scripts/vm installs it") from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
        raise StepError(f"{command[0]} failed with status {done.returncode}: {said}")
    return done.stdout


class Made:
    """A file or directory that is kept, and made again when what it is made from has changed."""

    def __init__(self, path: Path, *sources: str) -> None:
        self.path = path
        self._stamp = path.with_name(path.name + ".stamp")
        self._wanted = hashlib.sha256("\0".join(sources).encode()).hexdigest()

    def is_fresh(self) -> bool:
        """Tell whether it need not be made."""
        return self.path.exists() and self._stamp.exists() and self._stamp.read_text() == self._wanted

    def clear(self) -> Path:
        """Take away what is stale, make its parents, and return the path."""
        self._stamp.unlink(missing_ok=True)
        if self.path.is_dir():
            shutil.rmtree(self.path)
        self.path.unlink(missing_ok=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return self.path

    def finish(self) -> Path:
        """Note that it is complete, and return the path."""
        self._stamp.write_text(self._wanted)
        return self.path


def sources_of(*paths: Path) -> Iterator[str]:
    """Yield the names and contents of files, and of those below directories, as text."""
    for path in paths:
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            if file.is_file() and file.suffix not in {".so", ".pyc"}:
                yield f"{file.relative_to(ROOT)} {hashlib.sha256(file.read_bytes()).hexdigest()}"


def debian_tree() -> Path:
    """Return a directory with a minimal Debian."""
    made = Made(BUILD / "debian", MIRROR, RELEASE, *PACKAGES)
    if not made.is_fresh():
        tree = made.clear()
        run("debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", RELEASE, tree, MIRROR)
        for name in ("var/cache/apt/archives", "var/lib/apt/lists"):
            shutil.rmtree(tree / name)
        (tree / "etc/hostname").write_text("guest\n")
        (tree / "etc/fstab").write_text("")
        (tree / "guest").mkdir()
        (tree / PREFIX).mkdir()
        (tree / "usr/local/bin/zramd").symlink_to("/" / PREFIX / "bin/zramd")
        run("chroot", tree, "passwd", "--delete", "root")
        made.finish()
    return made.path


def debian_disk() -> Path:
    """Return the image of a disk with a minimal Debian."""
    tree = debian_tree()
    made = Made(BUILD / "debian.ext4", (tree.with_name(tree.name + ".stamp")).read_text())
    if not made.is_fresh():
        make_disk(made.clear(), tree, DISK_SIZES["root"])
        made.finish()
    return made.path


def make_disk(image: Path, tree: Path, size: str) -> None:
    """Make the image of an ext4 file system of that size, with what is in the directory."""
    run("mkfs.ext4", "-q", "-d", tree, image, size)


def zramd_tree() -> Path:
    """Return a directory with zramd and the packages it needs, installed from wheels for the prefix in the guest."""
    needed = [ROOT / name for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "zramd")]
    debian = debian_tree()
    made = Made(BUILD / "zramd", *sources_of(*needed))
    if not made.is_fresh():
        target = made.clear()
        source, wheels, prefix = BUILD / "source", debian / "wheels", debian / PREFIX
        for directory in (source, wheels, prefix):
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir()
        # A copy: what lies in the checkout's build/ may be of an older layout.
        for path in needed:
            if path.is_dir():
                shutil.copytree(path, source / path.name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
            else:
                shutil.copy2(path, source)
        pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
        # Not by run(): an index that PIP_... names is meant here.
        done = subprocess.run([*pip, "wheel", source, "--wheel-dir", wheels], capture_output=True, text=True)
        if done.returncode:
            raise StepError(f"pip could not build zramd: {done.stderr.strip().splitlines()[-1]}")
        run("chroot", debian, "python3", "-m", "venv", "/" / PREFIX)
        run(
            "chroot",
            debian,
            "/" / PREFIX / "bin/pip",
            "--quiet",
            "install",
            "--no-index",
            "--find-links=/wheels",
            "zramd",
        )
        shutil.rmtree(wheels)
        prefix.rename(target)
        prefix.mkdir()
        made.finish()
    return made.path


def kernel(version: str) -> Kernel:
    """Return Debian's kernel of that version."""
    made = Made(BUILD / "kernels" / version, MIRROR, KERNELS[version], *MODULES)
    if not made.is_fresh():
        directory = made.clear()
        unpacked = directory / "package"
        unpacked.mkdir(parents=True)
        run("dpkg-deb", "-x", download_kernel(KERNELS[version], directory), unpacked)
        release = next((unpacked / "boot").glob("vmlinuz-*")).name.removeprefix("vmlinuz-")
        if not (unpacked / "lib").exists():
            (unpacked / "usr/lib").rename(unpacked / "lib")
        copy_modules(unpacked, release, directory)
        (unpacked / "boot" / f"vmlinuz-{release}").rename(directory / "vmlinuz")
        shutil.rmtree(unpacked)
        made.finish()
    release = next((made.path / "lib/modules").iterdir()).name
    return Kernel(release, made.path / "vmlinuz", made.path)


def download_kernel(release: str, directory: Path) -> Path:
    """Download the package that linux-image-amd64 of a Debian release depends on, leaving the host's apt alone."""
    state = BUILD / "apt" / release
    for name in ("lists/partial", "cache/archives/partial"):
        (state / name).mkdir(parents=True, exist_ok=True)
    sources, status = state / "sources.list", state / "status"
    sources.write_text(f"deb [arch=amd64 signed-by={KEYRING}] {MIRROR} {release} main\n")
    status.touch()
    settings = {
        "Dir::Etc::sourcelist": sources,
        "Dir::Etc::sourceparts": "-",
        "Dir::State::lists": state / "lists",
        "Dir::State::status": status,
        "Dir::Cache": state / "cache",
        "APT::Sandbox::User": "root",
    }
    options = [f"--option={name}={value}" for name, value in settings.items()]
    run("apt-get", *options, "--quiet", "update")
    depends = run("apt-cache", *options, "depends", "linux-image-amd64")
    package = next(line.split()[-1] for line in depends.splitlines() if "Depends: linux-image-" in line)
    run("sh", "-c", 'cd "$0" && exec apt-get "$@"', directory, *options, "--quiet", "download", package)
    return next(directory.glob("*.deb"))


def copy_modules(unpacked: Path, release: str, target: Path) -> None:
    """Copy the modules that are needed, uncompressed, and list them in the order in which to load them."""
    run("depmod", "-b", unpacked, release)
    order: list[Path] = []
    for module in MODULES:
        shown = run("modprobe", "-C", "/dev/null", "-d", unpacked, "-S", release, "--show-depends", module)
        order += [Path(line.split()[1]) for line in shown.splitlines() if line.startswith("insmod ")]
    names = []
    for path in dict.fromkeys(order):
        name = path.relative_to(unpacked).with_name(path.name.removesuffix(".xz"))
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        contents = path.read_bytes()
        (target / name).write_bytes(lzma.decompress(contents) if path.suffix == ".xz" else contents)
        names.append(f"/{name}")
    for listed in ("modules.builtin", "modules.order"):
        shutil.copy(unpacked / "lib/modules" / release / listed, target / "lib/modules" / release)
    run("depmod", "-b", target, release)
    (target / "load").write_text("\n".join(names) + "\n")


def initramfs(kernel: Kernel) -> Path:
    """Return an initramfs that loads the modules and goes on to the disk with Debian."""
    busybox = Path(shutil.which("busybox") or "/bin/busybox")
    init = GUEST / "initramfs"
    made = Made(kernel.modules / "initrd", *sources_of(init), kernel.release)
    if not made.is_fresh():
        image = made.clear()
        tree = kernel.modules / "initramfs"
        shutil.rmtree(tree, ignore_errors=True)
        for name in ("bin", "dev", "proc", "sys", "root"):
            (tree / name).mkdir(parents=True)
        shutil.copy(busybox, tree / "bin/busybox")
        shutil.copy(init, tree / "init")
        shutil.copy(kernel.modules / "load", tree)
        shutil.copytree(kernel.modules / "lib", tree / "lib")
        run("sh", "-c", 'cd "$0" && find . | cpio --quiet -o -H newc | gzip -1 >"$1"', tree, image)
        shutil.rmtree(tree)
        made.finish()
    return made.path


def hog() -> Path:
    """Return the program that fills memory and verifies it, compiled."""
    source = GUEST / "hog.c"
    made = Made(BUILD / "hog", *sources_of(source))
    if not made.is_fresh():
        run("gcc", "-O2", "-static", "-Wall", "-Werror", "-o", made.clear(), source)
        made.finish()
    return made.path


def make_payload(directory: Path, kernel: Kernel, files: Mapping[str, Path]) -> Path:
    """Make the image of a disk with zramd, the modules, what is in scripts/guest and further files by their names."""
    tree, image = directory / "payload", directory / "payload.ext4"
    shutil.copytree(GUEST, tree)
    shutil.copytree(zramd_tree(), tree / "zramd", symlinks=True)
    shutil.copytree(kernel.modules / "lib", tree / "lib")
    shutil.copy(hog(), tree / "hog")
    shutil.copy(shutil.which("busybox") or "/bin/busybox", tree / "busybox")
    for name, path in files.items():
        shutil.copy(path, tree / name)
    make_disk(image, tree, DISK_SIZES["payload"])
    shutil.rmtree(tree)
    return image
