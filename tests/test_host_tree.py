# SPDX-License-Identifier: Apache-2.0
"""``host-tree.sh``: after a journey to the host and back, the appliance has the tree that scripts made there."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path

import pytest

from virt_dib import layout, tools

NAMES = ("mnt", "hooks")
TREE = """
mkdir -p mnt/a/inner/inmost mnt/b/inner mnt/empty hooks/x.d
for path in a/one a/two b/one a/inner/file b/inner/file a/inner/inmost/file $'a/odd\nname *' kept; do
    echo "$path" >"mnt/$path"
done
ln -s one mnt/a/link
mkfifo mnt/a/pipe
ln mnt/a/two mnt/second
ln mnt/a/inner/file mnt/b/third
chmod 711 mnt/a/inner
touch -d @1000000000 mnt/*/* mnt/* mnt
"""
CHANGES = {
    "nothing": ":",
    "a directory has another name": "mv a c",
    "a directory is in another": "mv a b/c",
    "a directory is elsewhere, by an odd name": "mv a/inner $'new\nname *'",
    "two directories are exchanged": "mv a t; mv b a; mv t b",
    "directories are exchanged inside of one": "mv a/inner t; mv b/inner a/inner; mv t b/inner",
    "a directory is where a removed one was": "rm -r a; mv b a",
    "a directory was made anew": "rm -r a; mkdir a; echo new >a/one",
    "a directory comes to the place of a file": "rm kept; mv a kept",
    "a file comes to the place of a directory": "rm -r a; mv kept a",
    "a link comes to the place of a directory": "mv a c; ln -s c a",
    "a file has another name": "mv a/one a/new",
    "two files are exchanged": "mv a/one t; mv b/one a/one; mv t b/one",
    "a file with two names has another one": "mv a/two a/new",
    "the other name is gone": "rm a/two",
    "a file has a further name": "ln a/one fourth",
    "a file is another one's": "ln -f a/one kept",
    "a file is written": "echo more >>a/two",
    "a mode": "chmod 700 a",
    "a hook is in the tree": "mv ../hooks/x.d x.d; mkdir ../hooks/y.d",
}


@dataclass(frozen=True, kw_only=True)
class Journey:
    """A tree in the appliance, and its copy."""

    top: Path

    @property
    def appliance(self) -> Path:
        return self.top / "appliance"

    @property
    def host(self) -> Path:
        return self.top / "host"

    def step(self, *words: str | Path, archive: Path | None = None, in_appliance: bool = False) -> str:
        """Run a step of the program, as root of a user namespace where this user is not root, as builds do."""
        command: list[str | Path] = ["/bin/bash", layout.guest_script("host-tree.sh"), *words]
        spaces = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
        if in_appliance:
            spaces.append("--mount")
        if spaces:
            command = [tools.require("unshare", purpose="run the tests", package="util-linux"), *spaces, *command]
        return tools.run_together({"it": tools.Command(words=command, stdin=archive)})["it"].stdout

    def script(self, place: Path, text: str) -> None:
        """Run a text of bash."""
        tools.run(["/bin/bash", "-euc", text], doing="running a script", cwd=place)

    def there(self) -> Path:
        """Copy it to the host; return the archive."""
        archive = self.top / "tree.tar"
        self.step("pack", archive, self.appliance, *NAMES, in_appliance=True)
        for name in NAMES:
            (self.host / name).mkdir(parents=True)
        return archive

    def run(self, text: str) -> None:
        """Change the copy, and the tree as the copy was changed."""
        archive = self.there()
        before, out = self.top / "before", self.top / "out"
        begun = self.step("unpack", self.host, before, archive=archive).strip()
        assert shape(self.host) == shape(self.appliance)
        self.script(self.host / "mnt", text)
        self.step("changes", self.host, before, begun, out, archive=archive)
        self.step("apply", out / "changes.tar", out / "removed", self.appliance, *NAMES, in_appliance=True)


def shape(top: Path) -> dict[str, tuple[object, ...]]:
    """Everything of a tree that can be told from another one."""
    first_names: dict[int, str] = {}
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(top.rglob("*")):
        state, name = path.lstat(), str(path.relative_to(top))
        content = ""
        if stat.S_ISREG(state.st_mode):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        elif stat.S_ISLNK(state.st_mode):
            content = os.readlink(path)
        first = first_names.setdefault(state.st_ino, name)
        found[name] = (f"{state.st_mode:o}", state.st_uid, state.st_mtime_ns, content, first)
    return found


@pytest.fixture
def journey(tmp_path: Path) -> Journey:
    made = Journey(top=tmp_path)
    made.appliance.mkdir()
    made.script(made.appliance, TREE)
    return made


@pytest.mark.parametrize("change", CHANGES)
def test_the_tree_is_as_the_copy_became(change: str, journey: Journey) -> None:
    before = shape(journey.appliance)
    journey.run(CHANGES[change])
    assert shape(journey.appliance) == shape(journey.host)
    assert (shape(journey.host) == before) == (change == "nothing")


def test_what_was_not_changed_stays_where_it_is(journey: Journey) -> None:
    before = {path: path.lstat().st_ino for path in journey.appliance.rglob("*")}
    with contextlib.ExitStack() as stack:
        # The file system gives the number of what is gone to what comes next, unless somebody has it open.
        for path in before:
            stack.callback(os.close, os.open(path, os.O_PATH | os.O_NOFOLLOW))
        journey.run("echo more >>b/one; mv a/inner c")
    after = {path: path.lstat().st_ino for path in journey.appliance.rglob("*")}
    gone = {str(path.relative_to(journey.appliance / "mnt")) for path in before if before[path] != after.get(path)}
    assert gone == {"b/one", "b/third", "a/inner", "a/inner/file", "a/inner/inmost", "a/inner/inmost/file"}


def test_holes_of_files_are_holes_everywhere(journey: Journey) -> None:
    make = "truncate --size 32M {0}/one {0}/two {0}/three; echo end >>{0}/one; echo end >>{0}/three"
    journey.script(journey.appliance / "mnt", make.format("empty"))
    journey.run(make.format("b") + "; rm empty/two; mv empty/three empty/four")
    assert shape(journey.appliance) == shape(journey.host)
    places = (journey.appliance / "mnt", journey.host / "mnt")
    files = [path for place in places for path in place.rglob("*") if path.lstat().st_size >= 32 << 20]
    assert len(files) == 10
    assert [path for path in files if path.stat().st_blocks * 512 > 1 << 20] == []
    assert (journey.top / "tree.tar").stat().st_size < 1 << 20
