# SPDX-License-Identifier: Apache-2.0
"""Elements as nobody should write them: whatever is in their directories, a plan is made, or an error says why not."""

from __future__ import annotations

import dataclasses
import os
import re
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from helpers import TESTS, Run, make_element, make_tiny_os, tree_stage, tree_stage_command
from virt_dib import api, cli, environment, hooks, plan, prerequisites, scripts, tools, workspace
from virt_dib.errors import ElementError, ToolError, UsageError, VirtDibError
from virt_dib.spec import BuildSpec


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with ``elements/one``, an operating system with one script, on a host that has what builds need."""
    monkeypatch.setattr(prerequisites, "require_prerequisites", list)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    make_element(tmp_path / "elements", "one", {"install.d/50-x": "#!/bin/bash\n"}, provides=["operating-system"])
    return tmp_path


def spec_in(place: Path, *elements: str, more_paths: Sequence[Path] = ()) -> BuildSpec:
    return BuildSpec(
        name="x",
        output_dir=place,
        elements=elements or ("one",),
        element_paths=(place / "elements", *more_paths),
        skip_base=True,
        network=False,
    )


def planned(place: Path, *elements: str, more_paths: Sequence[Path] = ()) -> api.ImagePlan:
    return api.plan_image(spec_in(place, *elements, more_paths=more_paths))


def refused(place: Path, *elements: str, more_paths: Sequence[Path] = ()) -> VirtDibError:
    """The error, after which nothing of the plan is left."""
    before = set(place.iterdir())
    with pytest.raises(VirtDibError) as caught:
        planned(place, *elements, more_paths=more_paths)
    assert all(problem.hint for problem in caught.value.problems)
    assert set(place.iterdir()) == before
    return caught.value


def messages(error: VirtDibError) -> list[str]:
    return [problem.message for problem in error.problems]


# ---- names ----

ODD_NAMES = (
    "two words", "line\nend", "-rf", "$(touch pwned)", "`id`", "a'b", 'a"b', "a]b", "[", "*", "~", "a\\b", "a\tb",
    "a;b", "\x1b]0;title\x07", "#", "%s", "{0}", "a:b", "a,b", "=", "caf\udce9", "x" * 255, "\u202e",
)  # fmt: skip


def test_names_of_all_kinds_in_one_plan(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    for number, name in enumerate(ODD_NAMES):
        files = {f"root.d/{number:02}-odd": "#!/bin/bash\n", f"root.d/{name[:200]}": "", f"{name}/{name}": "text"}
        make_element(place / "elements", name, files)
    # Names with blanks are those of several elements on a command line, but not in a list of an element.
    listed = [name for name in ODD_NAMES if "\n" not in name and name.isprintable()]
    (place / "elements/one/element-deps").write_text("".join(f"{name}\n" for name in listed))
    named = [name for name in ODD_NAMES if name not in listed and not set(name) & set(" \t\n")]
    made = planned(place, "one", *named)
    assert made.elements.keys() == {"one", *listed, *named}
    names = [script.name for script in made.scripts]
    assert {f"{number:02}-odd" for number, name in enumerate(ODD_NAMES) if name in made.elements} <= set(names)
    assert not (place / "pwned").exists()


def test_a_list_of_elements_has_a_line_for_each(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_element(place / "elements", "line\nend", {})
    make_element(place / "elements", "\x1b[2Jx", {})
    (place / "elements" / "root").symlink_to("/")
    assert cli.main(["--list-elements", "-p", str(place / "elements")]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert {"x", "one"} <= set(lines)
    assert "line end" not in lines
    assert not {"line", "end", "", "root"} & set(lines)


def test_directories_for_the_build_with_odd_names(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("two words", "line\nend", "$(id)", "a:b", "a[1]", "caf\udce9", "'"):
        (place / name).mkdir()
        monkeypatch.setenv("TMPDIR", str(place / name))
        with workspace.open_workspace() as directory:
            assert directory.parent == place / name


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 3000, "circle", "file", "nothing"])
def test_directories_for_the_build_that_are_none(place: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "circle").symlink_to("circle")
    (place / "file").touch()
    monkeypatch.setenv("TMPDIR", str(place / name))
    error = refused(place)
    assert isinstance(error, ToolError)
    assert "making a directory for the build" in str(error)


# ---- links, FIFOs, devices ----


def test_links_in_a_search_path_to_nothing_that_can_be(place: Path) -> None:
    for number, target in enumerate(("nothing", "x" * 300, "x/" * 2000, "/dev/null", "/proc/self/mem", "/")):
        (place / "elements" / f"link-{number}").symlink_to(target)
    (place / "elements" / "circle").symlink_to("circle")
    os.mkfifo(place / "elements" / "fifo")
    assert planned(place).elements.keys() == {"one"}


def test_links_in_an_element_to_nothing_that_can_be(place: Path) -> None:
    names = ("root.d", "install.d/60-link", "install.d/.link", "static", "block-device-default.yaml", "tests")
    targets = ("nothing", "x" * 300, "circle", "/dev/null", "/dev/zero")
    for number, target in enumerate(targets):
        one = make_element(place / "elements", f"e{number}", {"circle": ""})
        (one / "circle").unlink()
        (one / "circle").symlink_to("circle")
        for name in names:
            path = one / name.replace("60", str(60 + number))
            path.parent.mkdir(exist_ok=True)
            if not (name.endswith(".yaml") and target.startswith("/dev")):
                path.symlink_to(target)
    made = planned(place, "one", *(f"e{number}" for number in range(len(targets))))
    assert [script.name for script in made.scripts] == ["50-x"]


def test_special_files_where_hooks_are_and_elsewhere(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = place / "elements/one"
    for directory in ("", "files", "tests"):
        (one / directory).mkdir(exist_ok=True)
        os.mkfifo(one / directory / "fifo")
        monkeypatch.chdir(one / directory)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("socket")
    os.mkfifo(one / "install.d" / ".hidden")
    error = refused(place)
    assert isinstance(error, ElementError)
    # No hooks are in tests, and hidden files are none.
    assert messages(error) == [
        f"copying '{one / path}': it is a device, FIFO or socket"
        for path in ("fifo", "files/fifo", "files/socket", "socket")
    ]


def test_a_file_that_is_one_hole_is_copied_as_one(place: Path) -> None:
    sizes = {"top": 1 << 40, "install.d/data": 1 << 36, "tests/data": 1 << 36}
    for name, size in sizes.items():
        path = place / "elements/one" / name
        path.parent.mkdir(exist_ok=True)
        with path.open("wb") as stream:
            stream.seek(size // 2)
            stream.write(b"middle")
            stream.truncate(size)
    assert planned(place).elements.keys() == {"one"}


# ---- what is not for the eyes of elements ----


@pytest.fixture
def secret(place: Path) -> Path:
    """A directory of the user's."""
    directory = place / "home" / ".ssh"
    directory.mkdir(parents=True)
    (directory / "id_ed25519").write_text("the key\n")
    return directory


def test_hook_directories_that_lead_elsewhere_on_the_host(place: Path, secret: Path) -> None:
    two = make_element(place / "elements", "two", {})
    names = ("environment.d", "install.d", "pre-install.d", "static")
    for name in names:
        (two / name).symlink_to(secret)
    assert messages(refused(place, "one", "two")) == [
        f"copying '{two / name}': it is a link to '{secret}', where no elements are" for name in names
    ]
    # Who has elements there means it.
    assert planned(place, "one", "two", more_paths=[secret.parent]).elements.keys() == {"one", "two"}


def test_hook_directories_that_elements_share(place: Path) -> None:
    common = make_element(place / "elements", "common", {"shared/60-shared": "#!/bin/bash\n"})
    (common / "shared" / "60-shared").chmod(0o755)
    two = make_element(place / "elements", "two", {})
    (two / "pre-install.d").symlink_to("../common/shared")
    assert {script.name for script in planned(place, "one", "two").scripts} == {"50-x", "60-shared"}


def test_an_element_that_leads_elsewhere_on_the_host(place: Path, secret: Path) -> None:
    (place / "elements/one/element-deps").write_text(".ssh\n")
    (place / "elements" / "link").symlink_to(secret)
    assert messages(refused(place)) == [
        f"the element '.ssh' is a link to '{secret}', which has nothing of an element in it"
    ]


def test_a_directory_that_passes_for_an_element_of_another_path(place: Path, secret: Path) -> None:
    """What a path before overrides comes along, under its own name; but only if it is an element."""
    (place / "second").mkdir()
    (place / "second" / "one").symlink_to(secret)
    spec = spec_in(place, more_paths=[place / "second"])
    (place / "work").mkdir()
    staged = plan.make_plan(spec, place / "work", host_environment={}).staging.directory
    assert [path.name for path in (staged / "elements/0").iterdir()] == ["one"]
    assert list((staged / "elements/1").iterdir()) == []
    assert "the key" not in "".join(path.read_text() for path in staged.rglob("id_*"))


def test_elements_that_are_links_to_elements_elsewhere(place: Path) -> None:
    make_element(place / "elsewhere", "two", {"install.d/60-two": "#!/bin/bash\n"})
    make_element(place / "elsewhere", "three", {"README.rst": "nothing but dependencies and text"})
    for name in ("two", "three"):
        (place / "elements" / f"link-{name}").symlink_to(place / "elsewhere" / name)
    assert planned(place, "one", "two", "three").elements.keys() == {"one", "two", "three"}


# ---- what may not be read ----

AS_ANOTHER_USER = """
import sys
from pathlib import Path
from virt_dib import api, prerequisites
prerequisites.require_prerequisites = list
for line in sys.stdin.read().splitlines():
    place = Path(line)
    spec = api.BuildSpec(name="x", output_dir=place, elements=("one",), element_paths=(place / "elements",),
                         skip_base=True, network=False)
    try:
        print(place.name, "planned", *[script.name for script in api.plan_image(spec).scripts])
    except api.VirtDibError as error:
        for problem in error.problems:
            print(place.name, problem.message)
"""
CONFIG = "block-device-default.yaml"
READING = f"reading the block device configuration '{{one}}/{CONFIG}': Permission denied"
UNREADABLE = {
    # what has no permissions, or is a link to such a directory: the messages
    "root.d": ["copying '{one}/root.d': Permission denied"],
    "install.d/50-x": ["copying '{one}/install.d/50-x': Permission denied"],
    "tests": ["copying '{one}/tests': Permission denied"],
    "files/data": ["copying '{one}/files/data': Permission denied"],
    "element-provides": ["reading '{one}/element-provides': Permission denied"],
    CONFIG: [f"copying '{{one}}/{CONFIG}': Permission denied", READING],
    "link pre-install.d": ["copying '{one}/pre-install.d': Permission denied"],
    "link root.d": ["copying '{one}/root.d': Permission denied"],
    f"link {CONFIG}": [f"copying '{{one}}/{CONFIG}': Permission denied", READING],
    "link ../other": ["planned 50-x"],
}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user, and for root nothing is unreadable")
def test_what_another_user_may_not_read(anyones_dir: Path) -> None:
    (anyones_dir / "private" / "inside").mkdir(parents=True)
    (anyones_dir / "private").chmod(0o700)
    expected = []
    for number, (what, told) in enumerate(UNREADABLE.items()):
        place = anyones_dir / str(number)
        files = {"install.d/50-x": "#!/bin/bash\n", "tests/x": "", "files/data": ""}
        one = make_element(place / "elements", "one", files, provides=["operating-system"])
        path = one / what.removeprefix("link ")
        if what.startswith("link "):
            path.symlink_to(anyones_dir / "private" / "inside")
        else:
            if not path.exists():
                path.mkdir() if what.endswith(".d") else path.touch()
            path.chmod(0)
        place.chmod(0o777)
        expected += [f"{number} {message.format(one=one)}" for message in told]
    hidden = anyones_dir / "hidden"
    make_element(hidden / "elements", "one", {}, provides=["operating-system"])
    (hidden / "elements").chmod(0o644)
    hidden.chmod(0o777)
    expected += [f"hidden looking for elements in '{hidden}/elements': Permission denied"]
    setpriv = str(tools.require("setpriv", purpose="run the tests", package="util-linux"))
    said = tools.run(
        [setpriv, "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable, "-c", AS_ANOTHER_USER],
        doing="planning",
        stdin="".join(f"{anyones_dir}/{name}\n" for name in [*range(len(UNREADABLE)), "hidden"]).encode(),
        environment={
            "PYTHONPATH": str(TESTS.parent / "src"), "PYTHONDONTWRITEBYTECODE": "1", "PATH": "/usr/bin:/bin",
            "TMPDIR": str(anyones_dir), "HOME": "/nonexistent",
        },
    ).stdout.splitlines()  # fmt: skip
    assert said == expected


# ---- many ----


def test_five_thousand_scripts_in_one_phase(place: Path) -> None:
    directory = place / "elements/one/install.d"
    for number in range(5000):
        (directory / f"{number}-{'long' * 50}").symlink_to("50-x")
    (directory / "50-x").rename(directory / "10000-x")
    (directory / "50-x").symlink_to("10000-x")
    found = planned(place).scripts
    assert len(found) == 5002
    assert [script.name.partition("-")[0] for script in found] == sorted(
        [*map(str, range(5000)), "50", "10000"], key=int
    )


def test_two_thousand_elements_in_a_path_that_need_each_other_in_a_circle(place: Path) -> None:
    for number in range(2000):
        make_element(place / "elements", f"e{number}", {}, depends=[f"e{(number + 1) % 2000}"])
    assert planned(place).elements.keys() == {"one"}
    assert len(planned(place, "one", "e7").elements) == 2001


def test_a_megabyte_of_dependencies_that_do_not_exist(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lines = [f"missing-element-{number}" for number in range(50_000)]
    (place / "elements/one/element-deps").write_text("".join(f"{line}\n" for line in lines))
    assert len(refused(place).problems) == 50_000
    name = str(place / "x")
    assert cli.main(["--skip-base", "--name", name, "-p", str(place / "elements"), "one"]) == 2
    told = capfd.readouterr().err.splitlines()
    assert len([line for line in told if line.startswith("virt-dib: error: element 'missing-")]) == 100
    assert told[-2] == "virt-dib: error: 49900 more mistakes"
    assert told[-1] == "virt-dib: hint: mend the first ones first"


def test_the_longest_variable_that_a_program_can_have() -> None:
    """What virt-dib takes for it is what this kernel does."""
    env = tools.require("env", purpose="run the tests", package="coreutils")
    longest = environment.LONGEST_BYTES - len("A=\0")
    for length in (longest, longest + 1):
        fits = length == longest
        assert starts([env], {"A": "x" * length}) == fits
    assert starts([env], {f"A{number}": "x" * 100_000 for number in range(environment.MOST_BYTES // 100_100)})
    assert not starts([env], {f"A{number}": "x" * 100_000 for number in range(100)})


def starts(command: Sequence[str | Path], variables: dict[str, str]) -> bool:
    try:
        return tools.run(command, doing="starting it", environment=variables).exit_status == 0
    except ToolError as error:
        return "Argument list too long" not in str(error)


def test_more_in_variables_than_programs_can_have(place: Path) -> None:
    for number in range(300):
        make_element(place / "elements", f"{number:0255}", {})
    long = [f"{number:0255}" for number in range(300)]
    error = refused(place, "one", *long)
    assert isinstance(error, UsageError)
    told = r"the variable '(\w+)' has 15\d KiB, more than programs can have in one"
    assert [re.sub(told, r"\1", message) for message in messages(error)] == [
        "IMAGE_ELEMENT_YAML",
        "get_image_element_array",
    ]
    spec = dataclasses.replace(spec_in(place), variables={f"A{number}": "x" * 100_000 for number in range(20)})
    with pytest.raises(UsageError, match=r"the variables have 19\d\d KiB together, more than programs can have"):
        api.plan_image(spec)
    spec = dataclasses.replace(spec_in(place), variables={"A": "\ud800"})
    with pytest.raises(UsageError, match="half of a surrogate pair"):
        api.plan_image(spec)


# ---- scripts that cannot run, or will not ----


def test_scripts_that_no_build_can_run(place: Path) -> None:
    # A program of this host, but of no package of it.
    local = "/proc/self/exe"
    files = {
        "root.d/10-crlf": "#!/bin/bash\r\necho\r\n",
        "install.d/10-crlf": "#!/bin/bash\r\necho\r\n",
        "install.d/11-env": "#!/usr/bin/env python3\r\n",
        "finalise.d/12-options": "#! /bin/sh -e\r\n",
        "cleanup.d/13-missing": "#!/no/such/program -x\n",
        "cleanup.d/14-missing": "#!/usr/bin/nosuchprogram\n",
        "cleanup.d/15-file": "#!/usr/share\n",
        "cleanup.d/16-file": "#!/usr/lib/os-release\n",
        "cleanup.d/17-local": f"#!{local}\n",
        "cleanup.d/18-relative": "#!bash\n",
        "install.d/18-relative": "#!bash\n",
        "root.d/19-python": "#!/usr/bin/python3\nprint 'x'\n",
    }
    two = make_element(place / "elements", "two", files)
    (two / "root.d" / "20-link").symlink_to("10-crlf")
    crlf = "its lines end in CR LF, so there is no program of the name in the first one"
    there = "and there is no such program"
    expected = {
        "root.d/10-crlf": crlf,
        "root.d/20-link": crlf,
        "install.d/10-crlf": crlf,
        "install.d/11-env": crlf,
        "finalise.d/12-options": crlf,
        "cleanup.d/13-missing": f"its first line names '/no/such/program', {there}",
        "cleanup.d/14-missing": f"its first line names '/usr/bin/nosuchprogram', {there}",
        "cleanup.d/15-file": f"its first line names '/usr/share', {there}",
        "cleanup.d/16-file": f"its first line names '/usr/lib/os-release', {there}",
        "cleanup.d/17-local": f"its first line names '{local}', and of this host the guest has the programs of "
        "packages alone",
        "cleanup.d/18-relative": "its first line names 'bash', which is no absolute path",
        "install.d/18-relative": "its first line names 'bash', which is no absolute path",
        "root.d/19-python": "it is not Python 3, line 2: Missing parentheses in call to 'print'. Did you mean "
        "print(...)?",
    }
    error = refused(place, "one", "two")
    assert isinstance(error, ElementError)
    assert sorted(messages(error)) == sorted(
        f"script '{name}' of element 'two' cannot run: {reason}" for name, reason in expected.items()
    )
    hints = {problem.message.split("'")[1]: problem.hint for problem in error.problems}
    assert hints["root.d/10-crlf"] == f"have them end in LF: sed -i 's/\\r$//' {two}/root.d/10-crlf"
    assert hints["install.d/18-relative"] == "have it begin with #!/usr/bin/env bash"


def test_scripts_that_may_run(place: Path) -> None:
    files = {
        "root.d/10-guest": "#!/dib/programs/python\n",
        "root.d/11-made": "#!/tmp/interpreter\n",
        "root.d/12-blanks": "#! \t/bin/bash\t-e \n",
        "root.d/13-empty": "#!\nexit 0\n",
        "root.d/14-none": "echo\n",
        "root.d/15-perl": "#!/usr/bin/perl -w\r\nprint 1;\r\n",
        "root.d/16-nothing": "",
        "root.d/17-binary": "\x7fELF\0\0#!",
        "root.d/18-long": f"#!/bin/bash {'x' * 10000}\r\n",
        "install.d/20-inside": "#!/opt/of/the/image\n",
        "install.d/21-python": "#!/usr/bin/python2\nprint 'x'\n",
        "environment.d/10-good": "export A=1\n",
    }
    make_element(place / "elements", "two", files)
    made = planned(place, "one", "two")
    assert len(made.scripts) == len(files)
    assert made.warnings == ()


def test_what_will_not_be_run_is_told_before(place: Path) -> None:
    files = {
        "install.d/10-plain": "#!/bin/bash\n",
        "install.d/11-data": "no script\n",
        "install.d/12-script.sh": "#!/bin/bash\n",
        "environment.d/13-crlf": "export A=1\r\n",
        "root.d/14-mark": "\ufeff#!/bin/bash\n",
    }
    two = make_element(place / "elements", "two", files)
    for name in files:
        if name.startswith("install.d"):
            (two / name).chmod(0o644)
    outside = {"20-there": "/usr/bin/true", "21-gone": "/usr/bin/nosuchprogram", "22-host": "/proc/self/exe"}
    for name, target in {**outside, "23-up": "../../root.d/14-mark", "24-dangling": "no", "25-made": "/tmp/x"}.items():
        (two / "root.d" / name).symlink_to(target)
    (two / "install.d" / "26-inside").symlink_to("/usr/bin/nosuchprogram")
    will_not = "of element 'two' will not run:"
    variables = "end in CR LF: so will the values of variables that it sets;"
    made = planned(place, "one", "two")
    assert sorted(made.warnings) == sorted([
        f"'install.d/10-plain' {will_not} it is not executable; chmod +x {two}/install.d/10-plain",
        f"lines of 'environment.d/13-crlf' {variables} sed -i 's/\\r$//' {two}/environment.d/13-crlf",
        "'root.d/14-mark' of element 'two' begins with a byte order mark: whatever its first line says, bash runs it",
        f"'root.d/21-gone' {will_not} it is a link to '/usr/bin/nosuchprogram', which is not there",
        f"'root.d/22-host' {will_not} it is a link to '/proc/self/exe', which is not there",
        f"'root.d/23-up' {will_not} it is a link to '../../root.d/14-mark', which is not there",
        f"'root.d/24-dangling' {will_not} it is a link to 'no', which is not there",
    ])  # fmt: skip


def test_not_all_warnings_of_a_checkout_without_modes(place: Path) -> None:
    two = make_element(place / "elements", "two", {f"install.d/{number}-x": "#!/bin/sh\n" for number in range(30)})
    for path in (two / "install.d").iterdir():
        path.chmod(0o644)
    made = planned(place, "one", "two")
    assert len(made.warnings) == 21
    assert made.warnings[-1] == "10 more of these"


BROKEN = {
    # a script, and the hint when it has failed
    "#!/bin/bash\r\necho\r\n": "names is not there, or cannot be run; or that line ends in CR LF",
    "#!/no/such/program\n": "names is not there, or cannot be run",
    "#!/usr/share\n": "names is not there, or cannot be run",
    "#!/usr/bin/env bash\r\n": "end in CR LF: have them end in LF",
    "#!/bin/bash -e\r\n": "end in CR LF: have them end in LF",
    "set -e\r\nexit 3\r\n": "end in CR LF: have them end in LF",
    "#!/bin/bash\n\r\nexit 3\n": "end in CR LF: have them end in LF",
    "\x7fELF\x01\0\0\0": "is no script, and no program for this processor",
}


@pytest.mark.parametrize("text", BROKEN)
def test_the_output_of_a_script_that_could_not_be_run(text: str, tmp_path: Path) -> None:
    """As bash of this host tells it; each carriage return begins a line, as in a log."""
    script = tmp_path / "50-x"
    script.write_text(text, newline="")
    script.chmod(0o755)
    bash = tools.require("bash", purpose="run the tests", package="bash")
    ran = tools.run([bash, "-c", '"$1"; exit $?', "bash", script], doing="running it", check=False)
    assert ran.exit_status != 0
    hint = scripts.advice(ran.stderr.replace("\r", "\n").splitlines())
    assert hint
    assert BROKEN[text] in hint


def test_ordinary_errors_are_no_matter_of_line_ends() -> None:
    for line in (
        "./50-x: line 3: nosuchprogram: command not found",
        "cat: /no/such/file: No such file or directory",
        "50-x: line 2: [: x: integer expression expected",
        "E: Unable to locate package 'x'",
        "env: 'nosuch': No such file or directory",
    ):
        assert scripts.advice([line]) is None


@pytest.mark.sandbox
def test_the_error_of_a_script_whose_interpreter_is_missing(place: Path) -> None:
    """One that another script has made, so that nobody could see it before."""
    make_tiny_os(place / "elements")
    make = (
        '#!/bin/bash\nprintf \'#!/bin/bash\\r\\necho\\r\\n\' >"$TARGET_ROOT/helper"\nchmod +x "$TARGET_ROOT/helper"\n'
    )
    make_element(place / "elements", "two", {"root.d/90-make": make, "install.d/50-x": "#!/bin/bash\n/helper\n"})
    (place / "out").mkdir()
    arguments: list[str | Path] = [
        "--name",
        "x",
        "--no-network",
        "--skip-base",
        "-p",
        place / "elements",
        "tiny-os",
        "two",
    ]
    run, _ = tree_stage(
        tree_stage_command(arguments, look="true"), cwd=place / "out", environment={**os.environ, "TMPDIR": str(place)}
    )
    assert run.exit_status == 1
    assert "install.d/50-x of element 'two' failed with exit status 127" in run.stderr
    assert "hint: the program that the first line of '/helper' names is not there" in run.stderr


# ---- names and numbers that really run ----


def built_in_sandbox(place: Path, *elements: str, look: str) -> tuple[Run, str]:
    """The tree stage with tiny-os and *elements*, and what *look* then prints inside."""
    make_tiny_os(place / "elements")
    (place / "out").mkdir()
    words: list[str | Path] = ["--name", "x", "--no-network", "--skip-base", "-p", place / "elements", "tiny-os"]
    return tree_stage(
        tree_stage_command([*words, *elements], look=look),
        cwd=place / "out",
        environment={**os.environ, "TMPDIR": str(place)},
    )


def bash_word(text: str) -> str:
    """*text* as bash reads it again, whatever bytes it has."""
    octal = "".join(f"\\{byte:03o}" for byte in os.fsencode(text))
    return f"$'{octal}'"


@pytest.mark.sandbox
def test_elements_with_names_of_all_kinds_are_built(place: Path) -> None:
    """Their scripts run, find the files of their names, and no name is ever run itself."""
    # As above: how an element can be named, in a list or on a command line.
    names = [name for name in ODD_NAMES if name.isprintable() or not set(name) & set(" \t\n")]
    listed = [name for name in names if name.isprintable()]
    for number, name in enumerate(names):
        outside = f'#!/bin/bash\ncat -- "/dib/elements/0"/{bash_word(name)}/{bash_word(f"{name}/{name}")}\n'
        odd = f"#!/bin/bash\necho odd name {number}\n"
        files = {
            f"root.d/{20 + number}-odd": outside,
            f"root.d/{name[:200]}": odd,
            f"install.d/{20 + number}-odd": f"#!/bin/bash\necho inside {number} >>/odd\n",
            f"install.d/{name[:200]}": odd,
            f"{name}/{name}": f"of element {number}\n",
        }
        make_element(place / "elements", name, files)
    # Those that no element can be named by are names of files.
    data = {f"data/{name}": f"data {number}\n" for number, name in enumerate(ODD_NAMES)}
    data["root.d/80-data"] = "#!/bin/bash\ncat -- /dib/elements/0/all/data/*\n"
    make_element(place / "elements", "all", data, depends=listed)
    look = """cat odd; find / \\( -path /proc -o -path /sys -o -path /usr \\) -prune -o -name pwned -print"""
    run, seen = built_in_sandbox(place, "all", *(name for name in names if name not in listed), look=look)
    assert run.exit_status == 0, run.stdout + run.stderr
    shown = run.stdout.splitlines()
    assert [line for line in shown if line.startswith("of element ")] == [f"of element {n}" for n in range(len(names))]
    assert {line for line in shown if line.startswith("data ")} == {f"data {n}" for n in range(len(ODD_NAMES))}
    # An odd name is that of a script where dib-run-parts takes it for one: in both phases.
    scripts_run = [number for number, name in enumerate(names) if hooks.is_script_name(name[:200])]
    assert names.index("-rf") in scripts_run
    assert sorted(line for line in shown if line.startswith("odd name ")) == sorted(
        f"odd name {number}" for number in [*scripts_run, *scripts_run]
    )
    assert seen.splitlines() == [f"inside {number}" for number in range(len(names))]
    assert not list(place.rglob("pwned"))


@pytest.mark.full
@pytest.mark.sandbox
def test_five_thousand_scripts_in_one_phase_run(place: Path) -> None:
    names = [f"{number:04}-x" for number in range(5000)]
    make_element(place / "elements", "many", {f"root.d/{name}": '#!/bin/sh\necho "${0##*/}" >>ran\n' for name in names})
    run, seen = built_in_sandbox(place, "many", look="cat /dib/out/ran")
    assert run.exit_status == 0, run.stdout[-5000:] + run.stderr
    assert seen.splitlines() == names
