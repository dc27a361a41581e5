# SPDX-License-Identifier: Apache-2.0
"""Time the same small build with our virt-dib and, where it is installed, with virt-dib 1.48.2.

    bench/tiny_build.py [--runs N] [--mib SIZE] [--old-library DIR] [--ours-only]

An operating system of about 140 MB comes from a tar.gz, one script of install.d runs, qcow2 and raw are
written, no partitions. Ours runs once in the appliance and once in the sandbox. The programs run in turn, so that a
machine that slows down slows down all. They are told not to use KVM unless --kvm is given. Prints every run, where
the time of ours went, the medians and their ratios.

The old virt-dib (Debian's package guestfs-tools) wants the library of DIB 1.28.0: it is taken from PyPI with pip
unless --old-library names its directory ``lib``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from virt_dib import tools

_ROOT_SCRIPT = """#!/bin/bash
set -eu
tar -xzf "$TMP_HOOKS_PATH/tree.tar.gz" -C "$TARGET_ROOT"
"""
_INSTALL_SCRIPT = """#!/bin/bash
set -eu
echo installed >/etc/installed
find /usr | wc -l
"""
_ATTEMPTS = 3
"""virt-dib 1.48.2 takes its disks in any order now and then, and fails; only good runs are counted."""
_OLD = "virt-dib 1.48.2"
_OLD_DIB = "diskimage-builder==1.28.0 --hash=sha256:2d8999a8484d27e8604d125aabcbdad648f8b601776225cfc611faf1a3b9a0e6"


def make_tree(target: Path, size_mib: int) -> int:
    """A tar.gz of about *size_mib* MiB that can be chrooted into; return its unpacked size in bytes."""
    programs = [
        "awk", "basename", "bash", "cat", "chmod", "chown", "cp", "cut", "date", "dd", "dirname", "env", "expr",
        "find", "grep", "head", "id", "ln", "ls", "mkdir", "mktemp", "mv", "printf", "readlink", "rm", "rmdir",
        "sed", "sh", "sleep", "sort", "stat", "tail", "tee", "touch", "tr", "true", "uname", "wc",
    ]  # fmt: skip
    paths: dict[str, Path] = {}
    for program in programs:
        real = tools.require(program, purpose="make the tree", package="coreutils").resolve()
        paths[f"bin/{program}"] = real
        listing = tools.run(["ldd", real], doing="listing libraries", check=False).stdout
        for word in listing.split():
            if word.startswith("/"):
                paths[word.lstrip("/")] = Path(word).resolve()
    size_bytes = sum(path.stat().st_size for path in paths.values())
    for path in sorted(Path("/usr/share").rglob("*")) + sorted(Path("/usr/lib").rglob("*.so*")):
        if size_bytes >= size_mib * 1024**2:
            break
        if path.is_file() and not path.is_symlink() and os.access(path, os.R_OK):
            paths.setdefault(str(path).lstrip("/"), path)
            size_bytes += path.stat().st_size
    with tarfile.open(target, "w:gz", compresslevel=6) as tar:
        for name in ("etc", "tmp", "proc", "sys", "dev", "run", "root", "var/log", "var/tmp"):
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(entry)
        for name, path in paths.items():
            tar.add(path, arcname=name, recursive=False, filter=_as_root)
    return size_bytes


def _as_root(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = "root"
    return entry


def make_elements(directory: Path, size_mib: int) -> int:
    """The element ``small-os`` in *directory*."""
    element = directory / "small-os"
    for phase, script in (("root.d", _ROOT_SCRIPT), ("install.d", _INSTALL_SCRIPT)):
        (element / phase).mkdir(parents=True)
        (element / phase / "50-small").write_text(script)
        (element / phase / "50-small").chmod(0o755)
    (element / "element-provides").write_text("operating-system\n")
    return make_tree(element / "tree.tar.gz", size_mib)


def old_library(scratch: Path, given: Path | None) -> Path:
    """The directory ``lib`` of DIB 1.28.0."""
    if given is not None:
        return given
    wanted = scratch / "wanted.txt"
    wanted.write_text(_OLD_DIB)
    words = ["download", "--quiet", "--no-deps", "--no-binary=:all:", "--require-hashes"]
    tools.run(
        [sys.executable, "-m", "pip", *words, "-d", scratch, "--requirement", wanted],
        doing="fetching DIB 1.28.0",
        environment=os.environ,
    )
    archive = next(scratch.glob("diskimage*1.28.0.tar.gz"))
    with tarfile.open(archive) as tar:
        tar.extractall(scratch)  # noqa: S202 - a release from the package index, into a private directory
    return next(scratch.glob("diskimage*1.28.0")) / "lib"


def timed(command: list[str | Path], cwd: Path, variables: dict[str, str]) -> tuple[float, str]:
    """Run *command*; return its seconds and its output."""
    for attempt in range(_ATTEMPTS):
        begun = time.monotonic()
        result = tools.run(command, doing="building", cwd=cwd, environment={**os.environ, **variables}, check=False)
        if result.exit_status == 0:
            return time.monotonic() - begun, result.stdout
        print(f"attempt {attempt + 1} failed: {result.stderr.strip()[-300:]}", flush=True)
    sys.exit(f"{command[0]} failed {_ATTEMPTS} times")


def report(seconds: dict[str, list[float]], outputs: dict[str, str]) -> None:
    """Print where the time of ours went in the last runs, medians and ratios."""
    medians = {who: statistics.median(values) for who, values in seconds.items()}
    for who in medians:
        if who != _OLD:
            print(f"\nwhere the time of {who} goes (last run):" + outputs[who][outputs[who].find("\n\n") :])
    for who, median in medians.items():
        ratio = f"  {median / medians[_OLD]:.2f} of {_OLD}" if _OLD in medians and who != _OLD else ""
        print(f"{who:16} median {median:7.1f} s{ratio}")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description="time a small build with ours and with virt-dib 1.48.2")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--mib", type=int, default=140)
    parser.add_argument("--old-library", type=Path)
    parser.add_argument("--ours-only", action="store_true")
    parser.add_argument("--kvm", action="store_true", help="let both use KVM")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="virt-dib-bench-", dir="/var/tmp") as scratch_name:
        scratch = Path(scratch_name)
        size_bytes = make_elements(scratch / "elements", given.mib)
        print(f"tree: {size_bytes / 1e6:.0f} MB")
        variables = {} if given.kvm else {"LIBGUESTFS_BACKEND_SETTINGS": "force_tcg"}
        common: list[str | Path] = ["--name", "small", "--formats", "qcow2,raw", "--size", "1G", "--skip-base"]
        common += ["-p", scratch / "elements", "small-os"]
        ours = [Path(sys.executable).with_name("virt-dib"), *common, "--isolation"]
        builds: dict[str, Callable[[], tuple[float, str]]] = {
            "ours, vm": lambda: timed([*ours, "vm"], scratch, variables),
            "ours, sandbox": lambda: timed([*ours, "sandbox"], scratch, variables),
        }
        installed = tools.find("virt-dib") if given.ours_only else Path("/usr/bin/virt-dib")
        if not given.ours_only and installed is not None and installed.exists():
            library = old_library(scratch, given.old_library)
            old: list[str | Path] = [installed, "-B", library, "--python", "/usr/bin/python3", *common]
            builds[_OLD] = lambda: timed(old, scratch, variables)
        seconds: dict[str, list[float]] = {name: [] for name in builds}
        outputs: dict[str, str] = {}
        for number in range(-1, given.runs):
            for who, build in builds.items():
                took, outputs[who] = build()
                kind = f"run {number + 1}" if number >= 0 else "warm-up"
                print(f"{kind:8} {who:16} {took:7.1f} s", flush=True)
                if number >= 0:
                    seconds[who].append(took)
        report(seconds, outputs)


if __name__ == "__main__":
    main()
