# SPDX-License-Identifier: Apache-2.0
"""``--extra-data host``: the scripts of extra-data.d find what is the user's, and can write to nothing else of it."""

from __future__ import annotations

import base64
import contextlib
import functools
import http.server
import os
import pwd
import shutil
import signal
import socket
import stat
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from helpers import ODD_VALUE, TESTS, Run, make_element, make_tiny_os, tree_stage, tree_stage_command
from test_failures import wait_for
from test_sandbox import ordinary_user
from virt_dib import layout, namespaces, tools
from virt_dib.errors import ApplianceError
from virt_dib.files import remove_tree

pytestmark = pytest.mark.sandbox

USER_AND_PASSWORD = "alice:password1"
IN_THE_CHROOT = ("00-package-installs", "01-install-bin", "01-package-installs", "10-package-installs",
                 "95-package-uninstalls", "99-package-uninstalls")  # fmt: skip
"""What of package-installs and install-bin needs more in the tree than there is."""
WITH_REPOSITORIES = ("tiny-os", "sources", "source-repositories")


@dataclass(frozen=True, kw_only=True)
class Account:
    """A user of the host, and the directories of one."""

    top: Path
    user: pwd.struct_passwd | None
    """None: who runs the tests."""

    @property
    def home(self) -> Path:
        return self.top / "home"

    @property
    def uid(self) -> int:
        return os.geteuid() if self.user is None else self.user.pw_uid

    @property
    def cache(self) -> Path:
        """The image cache where it is by default."""
        return self.home / ".cache/image-create"

    def own(self) -> None:
        """Have the user own everything."""
        if self.user is not None:
            for path in [self.top, *self.top.rglob("*")]:
                os.chown(path, self.user.pw_uid, self.user.pw_gid, follow_symlinks=False)

    def command(self, *arguments: str | Path, look: str = "true") -> list[str | Path]:
        """That of a tree stage with extra-data.d on the host; the user owns everything."""
        self.own()
        words = ["--name", "x", "--extra-data", "host", "--skip-base", "-p", self.top / "elements", *arguments]
        return tree_stage_command(words, look=look, user=self.user)

    @property
    def environment(self) -> dict[str, str]:
        return {"PATH": os.environ["PATH"], "HOME": str(self.home), "TMPDIR": str(self.top / "work")}

    def stage(self, *arguments: str | Path, look: str, environment: Mapping[str, str] | None = None) -> tuple[Run, str]:
        """Run it."""
        command = self.command(*arguments, look=look)
        return tree_stage(command, cwd=self.top / "out", environment={**self.environment, **(environment or {})})


@pytest.fixture(scope="module", params=["self", pytest.param("user", marks=pytest.mark.needs_root)])
def account(request: pytest.FixtureRequest) -> Iterator[Account]:
    user = ordinary_user() if request.param == "user" and os.geteuid() == 0 else None
    if request.param == "user" and user is None:
        pytest.skip("no ordinary user with subordinate ids who can run virt-dib, or no right to become one")
    # Where that user gets to, which pytest's directories are not; and it is one of the directories that are hidden.
    top = Path(tempfile.mkdtemp(prefix="virt-dib-test-", dir="/var/tmp"))
    try:
        top.chmod(0o755)
        for name in ("home/.ssh", "home/.cache", "home/repositories", "out", "work", "elements"):
            (top / name).mkdir(parents=True)
        make_tiny_os(top / "elements")
        yield Account(top=top, user=user)
    finally:
        shutil.rmtree(top)


# ---- repositories ----


def git(*words: str | Path, cwd: Path | None = None) -> str:
    who = [word for name in ("name", "email") for word in ("-c", f"user.{name}=test@example.com")]
    result = tools.run(
        ["git", *who, *words],
        doing="running git",
        cwd=cwd,
        environment={"PATH": os.environ["PATH"], "HOME": "/nonexistent", "GIT_CONFIG_NOSYSTEM": "1"},
    )
    return result.stdout.strip()


def make_repository(path: Path) -> None:
    """A bare repository with one commit, that a file server can serve."""
    work = path.with_suffix(".work")
    git("init", "--quiet", "--initial-branch=master", work)
    (work / "file").write_text(f"from {path.stem}\n")
    git("add", "file", cwd=work)
    git("commit", "--quiet", "--message=first", cwd=work)
    git("clone", "--quiet", "--bare", work, path)
    git("update-server-info", cwd=path)
    shutil.rmtree(work)


class NeedsPassword(http.server.SimpleHTTPRequestHandler):
    """Files for those who know the password."""

    def do_GET(self) -> None:
        expected = "Basic " + base64.b64encode(USER_AND_PASSWORD.encode()).decode()
        if self.headers["Authorization"] == expected:
            super().do_GET()
        else:
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="x"')
            self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002 - the base class's name
        """Be quiet."""


@contextlib.contextmanager
def served(directory: Path) -> Iterator[str]:
    """A web server on the host's loopback; gives its address."""
    handler = functools.partial(NeedsPassword, directory=str(directory))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def repositories(account: Account) -> Path:
    """The user's credentials, and an element with repositories that need them."""
    top = account.home / "repositories"
    lines = []
    for name in ("local", "path", "netrc", "helper", "ssh"):
        make_repository(top / f"{name}.git")
        lines.append(f"{name} git /opt/{name} https://example.invalid/{name}.git master\n")
    make_element(account.top / "elements", "sources", {"source-repository-sources": "".join(lines)})
    home = account.home
    (home / ".netrc").write_text("machine 127.0.0.1 login alice password nonsense\n")
    (home / ".ssh/id_test").write_text("the key\n")
    for path in (home / ".netrc", home / ".ssh/id_test"):
        path.chmod(0o600)
    (home / "credentials").write_text("#!/bin/sh\n[ $1 = get ] && printf 'username=alice\\npassword=password1\\n'\n")
    # As ssh would: the key, then the command on the other side.
    (home / "ssh").write_text('#!/bin/sh\ngrep -q "the key" ~/.ssh/id_test && eval "exec $3"\n')
    for path in (home / "credentials", home / "ssh"):
        path.chmod(0o755)
    return top


def locations(account: Account, address: str) -> list[str]:
    top = account.home / "repositories"
    places = {
        "local": f"file://{top}/local.git",
        "path": f"{top}/path.git",
        "netrc": f"{address}/netrc.git",
        "helper": f"{address.replace('127.0.0.1', 'localhost')}/helper.git",
        "ssh": f"ssh://git@example.invalid{top}/ssh.git",
    }
    return [word for name, place in places.items() for word in ("--envvar", f"DIB_REPOLOCATION_{name}={place}")]


@pytest.fixture(scope="module")
def builds(account: Account, repositories: Path) -> tuple[tuple[Run, str], tuple[Run, str], list[str]]:
    """Two builds, the second without network; and what the cache held between them."""
    excluded = [word for name in IN_THE_CHROOT for word in ("--exclude-script", name)]
    look = "cat opt/*/file; cat etc/dib-source-repositories; stat -c %u:%g opt/ssh/.git; find . -uid 65534"
    with served(repositories) as address:
        (account.home / ".netrc").write_text("machine 127.0.0.1 login alice password password1\n")
        (account.home / ".gitconfig").write_text(f"[credential]\n helper = {account.home}/credentials\n")
        arguments = [*excluded, *locations(account, address), *WITH_REPOSITORIES]
        environment = {"GIT_SSH_COMMAND": f"{account.home}/ssh -x", "GIT_SSH_VARIANT": "simple"}
        first = account.stage(*arguments, look=look, environment=environment)
        cached = sorted(path.name.partition("_")[0] for path in (account.cache / "source-repositories").iterdir())
    # The server is gone, and with it all that is not in the cache.
    second = account.stage("--no-network", *arguments, look=look, environment={"GIT_SSH_COMMAND": "false"})
    return first, second, cached


@pytest.mark.option("--extra-data")
def test_repositories_that_need_the_users_credentials(builds: tuple[tuple[Run, str], object, object]) -> None:
    run, seen = builds[0]
    assert run.exit_status == 0, run.stdout + run.stderr
    assert seen.splitlines() == [
        "from helper", "from local", "from netrc", "from path", "from ssh",
        "/opt/local", "/opt/path", "/opt/netrc", "/opt/helper", "/opt/ssh", "0:0",
    ]  # fmt: skip


def test_the_next_build_uses_what_is_cached(builds: tuple[tuple[Run, str], tuple[Run, str], list[str]]) -> None:
    (_, first), (run, second), cached = builds
    assert {"helper", "local", "netrc", "path", "ssh"} <= set(cached)
    assert run.exit_status == 0, run.stdout + run.stderr
    assert second == first


def test_a_local_repository_that_is_copied_to_the_guest(account: Account, repositories: Path) -> None:
    if account.user is not None:
        pytest.skip("who runs virt-dib makes no difference")
    excluded = [word for name in IN_THE_CHROOT for word in ("--exclude-script", name)]
    elements = account.top / "elements"
    make_element(
        elements, "copied", {"source-repository-copied": "local git /opt/local https://example.invalid/x master\n"}
    )
    arguments = [*excluded, "--envvar", f"DIB_REPOLOCATION_local={repositories}/local.git", "--extra-data", "guest"]
    run, seen = account.stage(
        "--no-network", *arguments, "tiny-os", "copied", "source-repositories", look="cat opt/local/file"
    )
    assert run.exit_status == 0, run.stdout + run.stderr
    assert seen == "from local\n"


# ---- the wall ----

ALLOWED = {
    "ask an agent", "read a key", "write to the tree", "write to the hooks", "write to the cache", "write to /tmp",
    "write to /var/tmp",
}  # fmt: skip
WHO_AND_WHAT = """#!/bin/bash
env -0 >"$TMP_MOUNT_PATH/environment"
{ id -un; whoami; sudo whoami; get_image_element_array; ssh -G example; } >"$TMP_MOUNT_PATH/who"
"""
LATER = """#!/bin/bash
[[ ! -e /tmp/in_target.d/hostile ]] || echo hooks >/later
"""


@dataclass(frozen=True, kw_only=True)
class Attack:
    """What came of a hostile script."""

    results: Mapping[str, str]
    seen: str
    who: str
    environment: Mapping[str, str]
    differences: set[str]


def state(account: Account) -> set[str]:
    """All of the account's files that a script must leave alone, and what is in them."""
    lines = set()
    for path in account.top.rglob("*"):
        if account.cache not in [path, *path.parents] and account.top / "work" not in path.parents:
            content = path.read_bytes() if path.is_file() else b""
            lines.add(f"{path.relative_to(account.top)} {path.lstat().st_mode:o} {content!r}")
    return lines


@pytest.fixture(scope="module")
def attack(account: Account) -> Iterator[Attack]:
    """A build whose extra-data.d is hostile."""
    script = "#!/usr/bin/python3 -IS\n" + (TESTS / "data" / "hostile.py").read_text()
    files = {
        "extra-data.d/05-who": WHO_AND_WHAT, "extra-data.d/10-hostile": script, "install.d/50-later": LATER,
    }  # fmt: skip
    make_element(account.top / "elements", "hostile", files)
    (account.home / ".ssh/id_test").write_text("the key\n")
    (account.home / ".ssh/config").write_text("Host example\n HostName real.example\n IdentityFile ~/.ssh/id_test\n")
    marker = f"virt-dib-bait-{os.getpid()}"
    with contextlib.ExitStack() as stack:
        bait, agent = (Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/tmp"))) for _ in range(2))
        for path in (bait, agent):
            path.chmod(0o777)
        (bait / "file").touch()
        (bait / "file").chmod(0o666)
        for address in (f"\0{marker}", str(account.home / "socket"), str(agent / "agent")):
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(address)
            listener.listen()
        (agent / "agent").chmod(0o777)
        command = ["bash", "-c", "while :; do read -r -t 60; done", marker]
        reader, writer = os.pipe()
        stack.callback(os.close, writer)
        stack.callback(os.close, reader)
        process = stack.enter_context(tools.started(command, stdin=reader))
        account.own()
        (account.top / "out/x.log").unlink(missing_ok=True)
        (account.top / "out/look").unlink(missing_ok=True)
        before = state(account)
        environment = {
            "BAIT_MARKER": marker,
            "BAIT_FILE": str(bait / "file"),
            "BAIT_PROCESS": str(process.pid),
            "SSH_AUTH_SOCK": str(agent / "agent"),
            "HOST_ODD": ODD_VALUE,
            "BOTH": "host",
        }
        look = (
            "cat attempts; echo; cat later; stat -c '%n %a %u:%g' setuid of-others link; getcap setuid; "
            "echo; cat who; echo; cat environment"
        )
        arguments = ["--envvar", "BOTH=option", "--envvar", "HOST_ODD", "tiny-os", "hostile"]
        run, seen = account.stage(*arguments, look=look, environment=environment)
        assert run.exit_status == 0, run.stdout + run.stderr
        assert process.poll() is None
        assert (bait / "file").read_bytes() == b""
        attempts, rest, who, variables = seen.split("\n\n", 3)
        results = dict(line.split("\t", 1) for line in attempts.splitlines())
        differences = {line for line in state(account) ^ before if not line.startswith(("out/x.log ", "out/look "))}
        yield Attack(
            results=results,
            seen=rest,
            who=who,
            environment=dict(item.split("=", 1) for item in variables.split("\0") if item),
            differences=differences,
        )


def test_a_script_does_what_it_is_there_for(attack: Attack) -> None:
    assert {name: attack.results[name] for name in ALLOWED} == dict.fromkeys(ALLOWED, "done")


def test_a_script_is_the_user(attack: Attack, account: Account) -> None:
    name = pwd.getpwuid(account.uid).pw_name
    first, second, third, elements, *ssh = attack.who.splitlines()
    assert [first, second, third] == [name] * 3
    assert f"[hostile]={account.top}/elements/hostile" in elements
    settings = dict(line.split(" ", 1) for line in ssh)
    assert (settings["user"], settings["hostname"]) == (name, "real.example")
    assert settings["identityfile"] in ("~/.ssh/id_test", f"{account.home}/.ssh/id_test")


def test_a_script_has_the_hosts_environment(attack: Attack, account: Account) -> None:
    seen = attack.environment
    assert (seen["HOST_ODD"], seen["BOTH"]) == (ODD_VALUE, "option")
    assert seen["SSH_AUTH_SOCK"].endswith("/agent")
    assert (seen["HOME"], seen["DIB_IMAGE_CACHE"]) == (str(account.home), str(account.cache))
    assert seen["PATH"] == f"/dib/bin:{os.environ['PATH']}"
    assert seen["TMPDIR"] == "/tmp"
    assert seen["TMP_MOUNT_PATH"] == seen["TMP_BUILD_DIR"] + "/mnt"
    first, second = seen["ELEMENTS_PATH"].split(":")
    assert (first, Path(second).parent / "lib") == (str(account.top / "elements"), Path(seen["_LIB"]))
    assert "TARGET_ROOT" not in seen


def test_a_hostile_script_gets_nowhere(attack: Attack) -> None:
    others = {name: result for name, result in attack.results.items() if name not in ALLOWED}
    assert len(others) > 15
    assert [name for name, result in others.items() if result == "done"] == []
    assert attack.differences == set()


def test_what_it_leaves_in_the_tree_has_the_owners_it_is_to_have(attack: Attack) -> None:
    assert attack.seen.splitlines()[:4] == ["hooks", "setuid 4755 0:0", "of-others 644 33:34", "link 777 0:0"]
    assert attack.seen.splitlines()[4] == "setuid cap_net_bind_service=ep"


def test_what_it_leaves_in_the_cache_is_the_users_and_no_way_to_them(attack: Attack, account: Account) -> None:
    assert attack.results["write to the cache"] == "done"
    found = {path.name: path.stat() for path in (account.cache / "program", account.cache / "of-others/inner")}
    assert {name: status.st_uid for name, status in found.items()} == {"program": account.uid, "inner": account.uid}
    assert found["program"].st_mode & 0o7777 == 0o755


def as_user(directory: Path, code: str, *arguments: str) -> str:
    """What *code* prints where the user is 0; it is given host-owners.py and *arguments*.

    Raises:
        ApplianceError: it fails.
    """
    (directory / "code.py").write_text(code)
    words = [sys.executable, "-I", "-S", directory / "code.py", layout.guest_script("host-owners.py"), *arguments]
    with namespaces.inside_namespace(["own", *map(str, words)], directory) as inside:
        namespaces.find_ids().map_as_user(inside.process.pid)
        inside.send(b"go")
        namespaces.finish(inside, "giving files their owners")
        return inside.said()


GIVE = """
import runpy, subprocess, sys
_, script, top, before, after = sys.argv
subprocess.run(["/bin/bash", "-euc", before], cwd=top, check=True)
sys.argv = [script, "cache", top]
runpy.run_path(script)
subprocess.run(["/bin/bash", "-euc", after], cwd=top, check=True)
"""
"""The cache gets its owners, between two texts of bash."""
only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files of others")


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "cache"
    path.mkdir()
    yield path
    remove_tree(path)


def shown(*paths: Path) -> list[str]:
    """Modes and owners."""
    states = [path.lstat() for path in paths]
    return [f"{stat.S_IMODE(state.st_mode):o} {state.st_uid}:{state.st_gid}" for state in states]


@pytest.mark.needs_root
@only_root
def test_what_belongs_to_others_in_the_cache_stays_theirs(tmp_path: Path, cache: Path) -> None:
    """As after sudo disk-image-create, or with other users."""
    for name, owner, mode in (("theirs", 54321, 0o4755), ("closed", 54321, 0o700)):
        (cache / name).mkdir()
        (cache / name / "program").touch()
        for path in (cache / name / "program", cache / name):
            os.chown(path, owner, owner + 1)
            path.chmod(mode)
    script = "for i in 1 2 3 4; do mkdir d$i; cp /bin/true d$i/x; chown 33:34 d$i/x; chmod 4755 d$i/x; done"
    as_user(tmp_path, GIVE, str(cache), script, ":")
    assert shown(cache / "theirs/program", cache / "closed") == ["4755 54321:54322", "700 54321:54322"]
    assert shown(*(cache / f"d{number}/x" for number in range(1, 5))) == ["755 0:0"] * 4


@pytest.mark.needs_root
@only_root
def test_the_group_of_a_shared_cache_stays(tmp_path: Path, cache: Path) -> None:
    (cache / "file").touch()
    for path, mode in ((cache, 0o2777), (cache / "file", 0o664)):
        os.chown(path, 0, 54321)
        path.chmod(mode)
    script = """
    umask 022
    touch new
    mkdir nobody; chgrp 0 nobody; chown 65534:65534 nobody
    cp /bin/true setuid; chmod 4755 setuid
    python3 -c 'import os; os.setresuid(33, 33, 33); os.mkdir("inner"); os.close(os.open("inner/others", os.O_CREAT))
os.chmod("inner/others", 0o4755)'
    mkdir hidden; cp /bin/true hidden/program; chmod 4755 hidden/program; chmod 077 hidden
    """
    as_user(tmp_path, GIVE, str(cache), script, ":")
    assert shown(cache, cache / "file", cache / "new") == ["2777 0:54321", "664 0:54321", "644 0:54321"]
    assert shown(cache / "setuid", cache / "hidden/program") == ["755 0:54321"] * 2
    assert shown(cache / "nobody", cache / "inner", cache / "inner/others") == ["2755 0:0", "2755 0:0", "755 0:0"]


DEEP = """
import os, runpy, shutil, stat, sys
_, script, top = sys.argv
os.chdir(top)
for _ in range(3000):
    os.mkdir("d")
    os.chdir("d")
shutil.copy("/bin/true", "program")
os.chown("program", 33, 33)
os.chmod("program", 0o4755)
sys.argv = [script, "cache", top]
try:
    runpy.run_path(script)
finally:
    state = os.stat("program")
    print(f"{stat.S_IMODE(state.st_mode):o} {state.st_uid}:{state.st_gid}")
"""


def test_there_may_be_any_number_of_directories_in_each_other(tmp_path: Path, cache: Path) -> None:
    assert as_user(tmp_path, DEEP, str(cache)) == "755 0:0\n"


MOVE = """
import os, runpy, sys
_, script, top, left = sys.argv
os.chdir(top)
os.makedirs("a/b/c")
os.mkdir("z")
for number in range(20):
    for directory in ("a", "a/b", "a/b/c", "."):
        os.close(os.open(f"{directory}/{number}", os.O_CREAT))
        os.chown(f"{directory}/{number}", 33, 33)
left = int(left)
def move(name, arguments):
    global left
    if name == "os.chown" and left and "/c/" in os.readlink(arguments[0]):
        left -= 1
        os.rename(*("a/b/c", "z/c") if os.path.exists("a/b/c") else ("z/c", "a/b/c"))
sys.addaudithook(move)
sys.argv = [script, "cache", top]
try:
    runpy.run_path(script)
finally:
    print(len([1 for place, _, names in os.walk(".") for name in names if os.stat(f"{place}/{name}").st_uid]))
"""


def test_a_directory_that_somebody_moves_is_gone_through_again(tmp_path: Path, cache: Path) -> None:
    assert as_user(tmp_path, MOVE, str(cache), "1") == "0\n"
    remove_tree(cache)
    cache.mkdir()
    assert as_user(tmp_path, MOVE, str(cache), "3") == "0\n"


def test_it_is_told_what_has_not_got_its_owner(tmp_path: Path, cache: Path) -> None:
    """Somebody makes six files unchangeable meanwhile."""
    refused = """
import os, runpy, sys
_, script, top = sys.argv
for number in range(7):
    os.close(os.open(f"{top}/{number}", os.O_CREAT))
    os.chown(f"{top}/{number}", 33, 33)
def refuse(name, arguments):
    if name == "os.chown" and not os.readlink(arguments[0]).endswith("/4"):
        raise OSError(30, "Read-only file system")
sys.addaudithook(refuse)
sys.argv = [script, "cache", top]
runpy.run_path(script)
"""
    with pytest.raises(ApplianceError, match=r"and 2 more$"):
        as_user(tmp_path, refused, str(cache))
    assert sorted(path.name for path in cache.iterdir() if path.stat().st_uid == os.geteuid()) == ["4"]


SWAP = """
import json, os, runpy, shutil, stat, sys
_, script, kind, event, left, top = sys.argv
program, victim = f"{top}/{kind}/program", f"{top}/elsewhere/victim"
for path, mode in ((program, 0o4755), (victim, 0o2711)):
    os.mkdir(os.path.dirname(path))
    with open(path, "x"):
        os.chown(path, *((33, 33) if (kind, path) == ("cache", program) else (0, 0)))
        os.chmod(path, mode)
os.setxattr(program, "security.capability", bytes.fromhex("0100000200040000000000000000000000000000"))
left = int(left)
def swap(name, _arguments):
    global left
    if name == event:
        left -= 1
        if left == 0:
            os.rename(program, program + ".aside")
            os.symlink(victim, program)
sys.addaudithook(swap)
sys.argv = [script, kind, f"{top}/{kind}"]
runpy.run_path(script)
for path in (program + ".aside", victim):
    state = os.lstat(path)
    print(f"{stat.S_IMODE(state.st_mode):o} {state.st_uid}:{state.st_gid}", *os.listxattr(path))
shutil.rmtree(f"{top}/{kind}")
"""


@pytest.mark.parametrize(
    ("kind", "event", "number"),
    [
        # The first is the directory's.
        ("tree", "os.chown", 2),
        ("tree", "os.getxattr", 1),
        ("tree", "os.chmod", 1),
        ("tree", "os.setxattr", 1),
        ("cache", "os.chown", 1),
        ("cache", "os.chmod", 1),
    ],
)
def test_a_file_that_becomes_a_link_before_it_gets_its_owner(
    tmp_path: Path, kind: str, event: str, number: int
) -> None:
    """A process of the sandbox, or of another user, swaps it before that call."""
    program, victim = as_user(tmp_path, SWAP, kind, event, str(number), str(tmp_path)).splitlines()
    assert victim == "2711 0:0"
    root = namespaces.OTHER_ROOT
    assert program == (f"4755 {root}:{root} security.capability" if kind == "tree" else "755 0:0")


def test_nothing_of_it_is_left(attack: Attack, account: Account) -> None:
    assert attack.seen
    assert list((account.top / "work").iterdir()) == []
    mine = [path for path in Path("/proc").glob("[0-9]*/cmdline") if b"10-hostile" in contents(path)]
    assert mine == []


def test_an_interrupted_phase_leaves_nothing(account: Account) -> None:
    marker = f"virt-dib-sleeps-{os.getpid()}"
    script = f"#!/bin/bash\n(trap '' TERM INT HUP; exec -a {marker} sleep 600) &\necho it sleeps\nsleep 600\n"
    make_element(account.top / "elements", "slow", {"extra-data.d/50-slow": script})
    command = account.command("tiny-os", "slow")
    with tools.started(
        command, environment=account.environment, cwd=account.top / "out", stderr=tools.TOGETHER
    ) as process:
        wait_for(account.top / "out/x.log", b"it sleeps")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    assert list((account.top / "work").iterdir()) == []
    assert [path for path in Path("/proc").glob("[0-9]*/cmdline") if marker.encode() in contents(path)] == []


def test_an_image_cache_around_the_home_is_refused(account: Account) -> None:
    for directory in (account.home, account.top):
        run, _ = account.stage("--image-cache", directory, "tiny-os", look="true")
        assert run.exit_status == 2
        assert "--image-cache" in run.stderr


def contents(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
