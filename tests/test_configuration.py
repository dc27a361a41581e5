# SPDX-License-Identifier: Apache-2.0
"""Settings in variables and files: which one counts, what is refused, and what is said about it."""

from __future__ import annotations

import grp
import os
import pwd
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import tomllib
from hypothesis import given
from hypothesis import strategies as st

from test_online import facts_of
from virt_dib import cli, command_line, configuration, doctor, environment, tools
from virt_dib.configuration import SETTINGS, Setting, Value
from virt_dib.environment import OnHost
from virt_dib.errors import UsageError
from virt_dib.options import BY_NAME, GROUPS, OFFERS, Given, Offer, Takes
from virt_dib.spec import Kvm, Phase

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "configuration.md"
MANUAL = ROOT / "docs" / "virt-dib.rst"
TIMES = ("60s", "90s", "1800s", "7200s")
NUMBERS = {
    "memory": ("512", "1024", "2048", "4096"),
    "cpus": ("2", "3", "4", "5"),
    "timeout": TIMES,
    "script_timeout": TIMES,
}
IDS = [setting.key for setting in SETTINGS]


def words_for(setting: Setting) -> Sequence[str]:
    """Some values that the option takes; they repeat where it takes few."""
    offer = OFFERS.get(setting.dest)
    if setting.dest == "python":
        return (sys.executable, "/bin/sh", "/bin/cat", "/bin/ls")
    if setting.dest in NUMBERS:
        return NUMBERS[setting.dest]
    if isinstance(offer, Offer):
        return ("/a", "/b", "/c", "/d")
    return (tuple(offer or ("off", "on")) * 4)[:4]


def option_for(setting: Setting, value: str) -> str:
    """The option that sets it to that on the command line."""
    option = BY_NAME[f"--{setting.key}"]
    if option.takes is Takes.VALUE:
        return f"--{setting.key}={value}"
    return f"--{setting.key}" if value == "on" else f"--no-{setting.key}"


def write(directory: Path, text: str) -> Path:
    """A configuration file below the directory of a user's or a system's configuration."""
    path = directory / "virt-dib" / "config.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def user(tmp_path: Path) -> Path:
    """The directory of the user's configuration files."""
    return tmp_path / "user"


@pytest.fixture
def surroundings(tmp_path: Path, user: Path) -> dict[str, str]:
    """An environment where no file of this host's is found."""
    return {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(user), "XDG_CONFIG_DIRS": f"{tmp_path}/one:{tmp_path}/two"}


def in_force(environ: Mapping[str, str], *arguments: str) -> dict[str, tuple[str | None, str]]:
    """The value of each setting and where it is from, nothing being wrong."""
    command = command_line.parse([*arguments, "x"], environ)
    assert command.problems == ()
    return {row.key: (row.text, row.origin) for row in command.in_force}


def told(environ: Mapping[str, str], *arguments: str) -> list[str]:
    return [problem.message for problem in command_line.parse([*arguments, "x"], environ).problems]


def hints(environ: Mapping[str, str], *arguments: str) -> list[str | None]:
    return [problem.hint for problem in command_line.parse([*arguments, "x"], environ).problems]


# ---- what can be set ----


def test_each_setting_is_an_option_that_the_command_line_can_overrule() -> None:
    for setting in SETTINGS:
        takes = {option.takes for options in GROUPS.values() for option in options if option.dest == setting.dest}
        assert takes in ({Takes.VALUE}, {Takes.ON, Takes.OFF}), setting.key
        assert getattr(Given(), setting.dest) is None


def test_the_names_follow_from_those_of_the_options() -> None:
    names = {setting.dest: (setting.key, setting.variable) for setting in SETTINGS}
    assert names["memory"] == ("memsize", "VIRT_DIB_MEMSIZE")
    assert names["host_certificates"] == ("host-certificates", "VIRT_DIB_HOST_CERTIFICATES")
    assert names["isolation"] == ("isolation", "VIRT_DIB_ISOLATION")
    assert all(f"--{setting.key}" in BY_NAME for setting in SETTINGS)


def rows(page: str) -> Iterator[tuple[str, str, set[str]]]:
    """Key, variable and options, of each row of the table."""
    for key, variable, options in re.findall(r"^\| `([a-z-]+)` \| `([A-Z_]+)` \| (.*?) \|", page, re.MULTILINE):
        yield key, variable, set(re.findall(r"`([^`]+)`", options))


def test_the_table_on_the_page_is_the_one_in_the_code() -> None:
    options = {
        setting.dest: {name for name, option in BY_NAME.items() if option.dest == setting.dest} for setting in SETTINGS
    }
    expected = [(setting.key, setting.variable, options[setting.dest]) for setting in SETTINGS]
    assert list(rows(PAGE.read_text())) == expected


@pytest.mark.parametrize("setting", SETTINGS, ids=IDS)
def test_the_page_has_the_words_of_a_setting(setting: Setting) -> None:
    offer = OFFERS.get(setting.dest)
    row = next(line for line in PAGE.read_text().splitlines() if line.startswith(f"| `{setting.key}` |"))
    words = re.findall(r"`([^`]+)`", row.rsplit("|", 2)[1])
    if setting.dest != "python":
        assert words == ([] if isinstance(offer, Offer) or setting.dest in NUMBERS else list(offer or ("on", "off")))


def test_the_manual_has_all_keys_and_variables() -> None:
    text = MANUAL.read_text()
    variables = set(re.findall(r"``(VIRT_DIB_[A-Z_]+)``", text))
    others = {configuration.FILE_VARIABLE, configuration.ENVIRONMENT_VARIABLE}
    assert variables == {setting.variable for setting in SETTINGS} | others
    (listed,) = re.findall(r"^The settings are (.*?)\. Paths", text, re.MULTILINE | re.DOTALL)
    assert re.findall(r"``([a-z-]+)``", listed) == IDS


@pytest.mark.parametrize("page", [PAGE, MANUAL], ids=lambda page: page.name)
def test_the_example_of_a_file_is_a_good_one(page: Path, tmp_path: Path) -> None:
    (example,) = re.findall(r"# ~/\.config/virt-dib/config\.toml\n((?:.*\n)*?)(?=\n|```)", page.read_text())
    file = tmp_path / "c.toml"
    file.write_text("\n".join(line.strip() for line in example.splitlines()))
    assert len(tomllib.loads(file.read_text())) == 4
    assert told({"HOME": str(tmp_path), "VIRT_DIB_CONFIG": str(file)}) == []


# ---- which place counts ----


@pytest.mark.parametrize("setting", SETTINGS, ids=IDS)
def test_each_place_comes_before_those_below_it(
    setting: Setting, surroundings: dict[str, str], user: Path, tmp_path: Path
) -> None:
    command_word, variable_word, user_word, system_word = words_for(setting)
    default = in_force(surroundings)[setting.key]
    assert default[1] == "default"

    last = write(tmp_path / "two", f'{setting.key} = "{command_word}"\n')
    assert in_force(surroundings)[setting.key] == (command_word, f"{last}:1")
    system = write(tmp_path / "one", f'\n{setting.key} = "{system_word}"\n')
    assert in_force(surroundings)[setting.key] == (system_word, f"{system}:2")
    own = write(user, f'# mine\n\n  "{setting.key}"="{user_word}"')
    assert in_force(surroundings)[setting.key] == (user_word, f"{own}:3")
    surroundings[setting.variable] = ""
    assert in_force(surroundings)[setting.key] == (user_word, f"{own}:3")
    surroundings[setting.variable] = variable_word
    assert in_force(surroundings)[setting.key] == (variable_word, setting.variable)
    option = option_for(setting, command_word)
    assert in_force(surroundings, option)[setting.key] == (command_word, "command line")
    others = {key: value for key, value in in_force(surroundings, option).items() if key != setting.key}
    assert {origin for _, origin in others.values()} == {"default"}


@pytest.mark.parametrize("setting", SETTINGS, ids=IDS)
def test_a_setting_does_what_the_option_does(setting: Setting, surroundings: dict[str, str], user: Path) -> None:
    for word in words_for(setting):
        by_option = command_line.parse([option_for(setting, word), "x"], {})
        by_variable = command_line.parse(["x"], {setting.variable: word})
        write(user, f'{setting.key} = "{word}"\n')
        by_file = command_line.parse(["x"], surroundings)
        for other in (by_variable, by_file):
            assert other.options == by_option.options
            assert [getattr(other.spec, name) for name in other.spec.__slots__ if name != "arguments"] == [
                getattr(by_option.spec, name) for name in other.spec.__slots__ if name != "arguments"
            ]


def test_a_file_that_is_named_is_the_only_one(surroundings: dict[str, str], user: Path, tmp_path: Path) -> None:
    write(user, "memsize = 512\nsmp = 2\n")
    write(tmp_path / "one", "this is no TOML\n")
    named, other = tmp_path / "named.toml", tmp_path / "other"
    named.write_text("memsize = 1024\n")
    other.write_text("memsize = 2048\n")
    surroundings["VIRT_DIB_CONFIG"] = str(named)
    assert in_force(surroundings)["memsize"] == ("1024", f"{named}:1")
    assert in_force(surroundings)["smp"] == (None, "default")
    assert in_force(surroundings, f"--config={other}")["memsize"] == ("2048", f"{other}:1")
    assert in_force(surroundings, "--config", "/dev/null")["memsize"] == (None, "default")


def test_one_that_is_named_may_be_a_pipe(surroundings: dict[str, str]) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"\nsmp = 7")
    os.close(writer)
    try:
        assert in_force(surroundings, f"--config=/dev/fd/{reader}")["smp"] == ("7", f"/dev/fd/{reader}:2")
    finally:
        os.close(reader)


@pytest.mark.parametrize("home", ["", "relative/config"])
def test_without_a_good_XDG_CONFIG_HOME_it_is_in_the_home_directory(  # noqa: N802 - a variable
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "relative/config", "smp = 3\n")
    file = write(tmp_path / ".config", "smp = 2\n")
    environ = {"HOME": str(tmp_path), "XDG_CONFIG_HOME": home, "XDG_CONFIG_DIRS": "/nowhere"}
    assert in_force(environ)["smp"] == ("2", f"{file}:1")
    assert in_force({**environ, "HOME": ""})["smp"] == (None, "default")


def test_relative_directories_of_the_system_are_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "relative", "smp = 3\n")
    file = write(tmp_path / "good", "smp = 2\n")
    environ = {"XDG_CONFIG_DIRS": f"relative::.:{tmp_path}/missing:{tmp_path}/good"}
    assert in_force(environ)["smp"] == ("2", f"{file}:1")


def test_the_systems_directory_unless_a_variable_names_others() -> None:
    for environ in ({"HOME": "/h"}, {"HOME": "/h", "XDG_CONFIG_DIRS": ""}):
        looked_for = list(configuration.settings(environ).files)
        assert looked_for == ["/h/.config/virt-dib/config.toml", "/etc/xdg/virt-dib/config.toml"]


def test_the_memory_of_libguestfs_comes_after_all_else(surroundings: dict[str, str], user: Path) -> None:
    assert in_force(surroundings)["memsize"][1] == "default"
    surroundings["LIBGUESTFS_MEMSIZE"] = "3000"
    assert in_force(surroundings)["memsize"] == ("3000", "LIBGUESTFS_MEMSIZE")
    file = write(user, "memsize = 4000\n")
    assert in_force(surroundings)["memsize"] == ("4000", f"{file}:1")


def test_the_settings_of_libguestfs_come_before_the_variable(surroundings: dict[str, str]) -> None:
    surroundings |= {"VIRT_DIB_KVM": "on", "LIBGUESTFS_BACKEND_SETTINGS": "force_tcg"}
    assert in_force(surroundings)["kvm"] == ("off", "LIBGUESTFS_BACKEND_SETTINGS")
    assert in_force(surroundings, "--kvm", "auto")["kvm"] == ("auto", "command line")
    surroundings["LIBGUESTFS_BACKEND_SETTINGS"] = "force_tcg:force_kvm"
    assert told(surroundings) == ["LIBGUESTFS_BACKEND_SETTINGS asks for force_kvm and force_tcg at the same time"]


@pytest.mark.parametrize(
    ("written", "text"),
    [("true", "on"), ("false", "off"), ('"yes"', "on"), ('"no"', "off"), ("1", "on"), ("0", "off"), ("'off'", "off")],
)
def test_on_and_off_in_a_file(written: str, text: str, surroundings: dict[str, str], user: Path) -> None:
    write(user, f"network = {written}\n")
    assert in_force(surroundings)["network"][0] == text


def test_a_number_may_be_text(surroundings: dict[str, str], user: Path) -> None:
    write(user, 'memsize = "1024"\nsmp = 0x10\n')
    assert [in_force(surroundings)[key][0] for key in ("memsize", "smp")] == ["1024", "16"]


@pytest.mark.parametrize(
    ("written", "path"),
    [
        ("cache", "{base}/user/virt-dib/cache"),
        ("../cache", "{base}/user/virt-dib/../cache"),
        ("/a/cache", "/a/cache"),
        ("~/cache", "{base}/cache"),
        ("~", "{base}"),
        ("~other/cache", "{base}/user/virt-dib/~other/cache"),
    ],
)
def test_paths_in_a_file(written: str, path: str, surroundings: dict[str, str], user: Path, tmp_path: Path) -> None:
    write(user, "".join(f'{key} = "{written}"\n' for key in ("image-cache", "drive", "dib-library")))
    spec = command_line.parse(["x"], surroundings).spec
    assert {str(found) for found in (spec.image_cache, spec.drive, spec.dib_library)} == {path.format(base=tmp_path)}


def test_paths_in_a_named_file_are_relative_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "c.toml").write_text('image-cache = "cache"\n')
    monkeypatch.chdir(tmp_path)
    assert in_force({}, "--config", "a/c.toml")["image-cache"] == (f"{tmp_path}/a/cache", "a/c.toml:1")


def test_paths_in_variables_are_as_on_the_command_line() -> None:
    assert in_force({"VIRT_DIB_DRIVE": "~/d.img", "HOME": "/h", "XDG_CONFIG_DIRS": "/n"})["drive"][0] == "~/d.img"


def test_a_python_is_a_name_on_the_path_or_a_path(surroundings: dict[str, str], user: Path) -> None:
    write(user, 'python = "python3"\n')
    assert in_force(surroundings)["python"][0] == str(tools.find("python3"))
    (user / "virt-dib" / "py").symlink_to(sys.executable)
    write(user, 'python = "./py"\n')
    assert Path(in_force(surroundings)["python"][0] or "").samefile(sys.executable)


# ---- what is refused ----


def test_many_mistakes_are_told_together(surroundings: dict[str, str], user: Path, tmp_path: Path) -> None:
    own = write(user, '# mine\nisolation = "sandbos"\nmemsise = 1\nsmp = 0\n\nkvm = [\n"auto"]\nnetwork = "maybe"\n')
    system = write(tmp_path / "one", 'compression = "xz"\nname = "d"\n')
    broken = write(tmp_path / "two", "smp = 2\nsmp = 3\n")
    surroundings |= {"VIRT_DIB_DRIVE_FORMAT": "vhd", "VIRT_DIB_NETWROK": "off"}
    assert sorted(told(surroundings, "--size", "x")) == sorted(
        [
            "unknown variable VIRT_DIB_NETWROK",
            f"in {own}:3: unknown setting 'memsise'",
            f"in {own}:6: cannot use this as 'kvm': it is neither text nor a whole number, true or false",
            f"in {system}:2: unknown setting 'name'",
            f"in {broken}:2: 'smp' is set twice",
            f"in {own}:2: unknown value of --isolation 'sandbos'",
            "cannot use 'x' as the size of the image",
            f"in {own}:4: cannot use '0' as the number of processors",
            f"in {own}:8: cannot use 'maybe' as on or off",
            "in VIRT_DIB_DRIVE_FORMAT: unknown format of the drive 'vhd'",
            f"in {system}:1: unknown compression 'xz'",
        ]
    )


def test_mistakes_of_a_file_come_in_the_order_of_its_lines(surroundings: dict[str, str], user: Path) -> None:
    own = write(user, 'timeout = "x"\nmemsise = 1\nsmp = 0\nkvm = []\nisolation = "sandbos"\n')
    of_file = [message for message in told(surroundings, "--size", "x") if message.startswith(f"in {own}:")]
    assert [message.removeprefix(f"in {own}:").partition(":")[0] for message in of_file] == ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ('smp = 2\n"smp" = 3\n', 2, "smp"),
        ('kvm = "on"\nsmp = 2\nkvm = [\n"auto",\n"on"]\nmemsize = 1\n', 3, "kvm"),
        ("smp = 2\nsmp = 3", 2, "smp"),
    ],
)
def test_a_key_that_is_there_twice_is_named(
    surroundings: dict[str, str], user: Path, text: str, line: int, key: str
) -> None:
    own = write(user, text)
    assert told(surroundings) == [f"in {own}:{line}: '{key}' is set twice"]


WRONG = {
    "dib-library": ("", "cannot use '' as the directory of --dib-library"),
    "python": ("no-such-python", "cannot use 'no-such-python' as --python: there is no such program"),
    "isolation": ("chroot", "unknown value of --isolation 'chroot'"),
    "extra-data": ("here", "unknown value of --extra-data 'here'"),
    "memsize": ("2G", "cannot use '2G' as the memory size in MB"),
    "smp": ("256", "cannot use '256' as the number of processors"),
    "timeout": ("soon", "cannot use 'soon' as the time of --timeout"),
    "script-timeout": ("0", "cannot use '0' as the time of --script-timeout"),
    "network": ("none", "cannot use 'none' as on or off"),
    "host-certificates": ("ON", "cannot use 'ON' as on or off"),
    "kvm": ("yes", "unknown value of --kvm 'yes'"),
    "drive": ("", "cannot use '' as the disk image of --drive"),
    "drive-format": ("vmdk", "unknown format of the drive 'vmdk'"),
    "image-cache": ("", "cannot use '' as the directory of --image-cache"),
    "compression": ("gzip", "unknown compression 'gzip'"),
}


@pytest.mark.parametrize("setting", SETTINGS, ids=IDS)
def test_a_wrong_value_is_told_with_its_place(setting: Setting, surroundings: dict[str, str], user: Path) -> None:
    text, message = WRONG[setting.key]
    file = write(user, f'\n{setting.key} = "{text}"\n')
    assert told(surroundings) == [f"in {file}:2: {message}"]
    if text:
        assert told({**surroundings, setting.variable: text}) == [f"in {setting.variable}: {message}"]
    good = words_for(setting)[0]
    assert told(surroundings, option_for(setting, good)) == []


@pytest.mark.parametrize("value", ["1.5", "[]", "{}", "2026-01-01", "07:30:00", "nan"])
def test_a_value_of_no_kind_that_is_known(value: str, surroundings: dict[str, str], user: Path) -> None:
    file = write(user, f"smp = {value}\n")
    kinds = "it is neither text nor a whole number, true or false"
    assert told(surroundings) == [f"in {file}:1: cannot use this as 'smp': {kinds}"]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("VIRT_DIB_NETWROK", "did you mean 'VIRT_DIB_NETWORK'?"),
        ("VIRT_DIB_NO_NETWORK", "did you mean 'VIRT_DIB_NETWORK'?"),
        ("VIRT_DIB_MEMORY", "did you mean 'VIRT_DIB_MEMSIZE'?"),
        ("VIRT_DIB_CONFG", "did you mean 'VIRT_DIB_CONFIG'?"),
        ("VIRT_DIB_SIZE", "give it with each build: --size"),
        ("VIRT_DIB_ELEMENT_PATH", "give it with each build: --element-path"),
        ("VIRT_DIB_", "'virt-dib --show-config' lists what can be set"),
        ("VIRT_DIB_ZZZZ", "'virt-dib --show-config' lists what can be set"),
    ],
)
def test_a_variable_that_is_not_known(name: str, hint: str, surroundings: dict[str, str]) -> None:
    surroundings[name] = "x"
    assert (told(surroundings), hints(surroundings)) == ([f"unknown variable {name}"], [hint])
    assert told({**surroundings, name: ""}) == []


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("memory", "did you mean 'memsize'?"),
        ("image_cache", "did you mean 'image-cache'?"),
        ("Isolation", "did you mean 'isolation'?"),
        ("no-network", "did you mean 'network'?"),
        ("quiet", "give it with each build: --quiet"),
        ("element_path", "give it with each build: --element-path"),
        ("zzzz", "'virt-dib --show-config' lists what can be set"),
        ('""', "'virt-dib --show-config' lists what can be set"),
    ],
)
def test_a_key_that_is_not_known(key: str, hint: str, surroundings: dict[str, str], user: Path) -> None:
    file = write(user, f"# a comment\n{key} = 1\n")
    assert told(surroundings) == [f"in {file}:2: unknown setting '{key.strip(chr(34))}'"]
    assert hints(surroundings) == [hint]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[wanted]\nsmp = 2", 1),
        ("smp = 2\n\n[[wanted]]\nx = 1\n[[wanted]]\ny = 2", 3),
        ("[a.smp]\n[a.b]\n[wanted.b]", 3),
        ("wanted.a = 1\nwanted.b = 2", 1),
        ('python = """\nwanted = 1\n"""\nwanted = 2', 4),
        ("python = '''\nwanted = 1\n'''\n# wanted = 2\nwanted = 3", 5),
        ('other = [\n"]",\n# wanted = 1\n[1, {wanted = 2}]\n]\r\n\r\n\twanted = 4', 7),
        ("python = 'sep \u2028 \u0085 arate'\nwanted = 1", 2),
        ("[smp]\nwanted = 1\n[wanted]", 3),
        ("'wanted' = {\tx = [\n1,\n2] }", 1),
    ],
)
def test_the_line_is_the_one_of_the_key(text: str, line: int, surroundings: dict[str, str], user: Path) -> None:
    file = write(user, text)
    assert f"in {file}:{line}: unknown setting 'wanted'" in told(surroundings)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"smp 2\n", "in {}:1: this is not TOML: Expected '=' after a key in a key/value pair"),
        (b"smp = 2\nkvm = on\n", "in {}:2: this is not TOML: Invalid value"),
        (b'smp = 2\n\nkvm = "on\nsmp = 3', "in {}:3: this is not TOML: Illegal character '\\n'"),
        (b"kvm = 'on", 'in {}:1: this is not TOML: Expected "\'"'),
        (b"smp = 2\nkvm = [\n'on',\n", "in {}:4: this is not TOML: "),
        (b"smp = " + b"9" * 5000, "in {}: this is not TOML: "),
        (b"smp = " + b"[" * 20000, "in {}: this is not TOML: "),
        (b"smp = 2\n# caf\xe9\n", "in {}:2: this is not UTF-8"),
        (b"\xff\xfes\0m\0p\0", "in {}:1: this is not UTF-8"),
        (b"smp = 2\0", "in {}:1: this is not TOML: "),
        (b"#" * ((1 << 16) + 1), "cannot read the configuration file '{}': larger than 64 KiB"),
    ],
    ids=range(11),
)
def test_a_file_with_something_else_in_it(
    content: bytes, message: str, surroundings: dict[str, str], user: Path
) -> None:
    file = write(user, "")
    file.write_bytes(content)
    for arguments in ([], ["--config", str(file)]):
        (found,) = told(surroundings, *arguments)
        assert found.startswith(message.format(file))


def test_files_that_cannot_be_read(surroundings: dict[str, str], user: Path, tmp_path: Path) -> None:
    file = user / "virt-dib" / "config.toml"
    file.mkdir(parents=True)
    (tmp_path / "one").write_text("")
    assert told(surroundings) == [f"cannot read the configuration file '{file}': is a directory"]
    missing = tmp_path / "missing"
    message = f"cannot read the configuration file '{missing}': no such file or directory"
    assert told({**surroundings, "VIRT_DIB_CONFIG": str(missing)}) == [message]
    assert told(surroundings, "--config", str(missing)) == [message]
    assert told(surroundings, "--config", "a\0b") == ["cannot read the configuration file 'a\0b': embedded null byte"]
    os.mkfifo(tmp_path / "fifo")
    message = f"cannot read the configuration file '{tmp_path / 'fifo'}': it is a FIFO that nobody writes to"
    assert told(surroundings, "--config", str(tmp_path / "fifo")) == [message]
    assert told(surroundings, "--config=") == ["cannot use an empty name for --config"]
    (endless,) = told(surroundings, "--config=/dev/zero")
    assert endless.endswith("larger than 64 KiB")


def test_a_file_that_the_user_may_not_read(surroundings: dict[str, str], user: Path) -> None:
    file = write(user, "smp = 2\n")
    file.chmod(0)
    if os.access(file, os.R_OK):
        pytest.skip("root may read all files")
    assert told(surroundings) == [f"cannot read the configuration file '{file}': permission denied"]


@pytest.mark.parametrize("mode", [0o602, 0o646, 0o666])
def test_a_file_that_others_can_write_is_not_trusted(
    mode: int, surroundings: dict[str, str], user: Path, tmp_path: Path
) -> None:
    for directory in (user, tmp_path / "one"):
        file = write(directory, "smp = 2\n")
        file.chmod(mode)
        assert told(surroundings) == [f"cannot trust the configuration file '{file}': others can write to it"]
        assert in_force(surroundings, f"--config={file}")["smp"][0] == "2"
        file.chmod(0o644)
        assert told(surroundings) == []


def test_the_users_own_group_may_write(
    surroundings: dict[str, str], user: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(user, "smp = 2\n")
    file.chmod(0o664)
    monkeypatch.setattr(pwd, "getpwuid", lambda _: pwd.struct_passwd(("me", "x", 1, 1, "", "/", "/bin/sh")))
    trusted = []
    for name in ("me", "you", "users"):
        for members in ([], ["me"], ["me", "you"]):
            group = grp.struct_group((name, "x", 1, members))
            monkeypatch.setattr(grp, "getgrgid", lambda _, group=group: group)
            if not told(surroundings):
                trusted.append((name, members))
    assert trusted == [("me", []), ("me", ["me"])]


def test_a_wrong_value_is_told_with_its_place_once(tmp_path: Path) -> None:
    environ = {"VIRT_DIB_ISOLATION": "chroot", "XDG_CONFIG_DIRS": "/nowhere"}
    result = run("--name", "d", "no-such-element", environ=environ, cwd=tmp_path)
    assert result.stderr.startswith("virt-dib: error: in VIRT_DIB_ISOLATION: unknown value of --isolation 'chroot'\n")
    assert result.stderr.count("VIRT_DIB_ISOLATION") == 1
    assert "element 'no-such-element' not found" in result.stderr


def test_a_file_of_another_user_is_not_trusted(
    surroundings: dict[str, str], user: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(user, "smp = 2\n")
    if os.geteuid() == 0:
        os.chown(file, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert told(surroundings) == [f"cannot trust the configuration file '{file}': it belongs to another user"]
    assert in_force(surroundings, f"--config={file}")["smp"][0] == "2"


def test_a_home_directory_that_is_not_known(surroundings: dict[str, str], user: Path) -> None:
    file = write(user, '\nimage-cache = "~/cache"\n')
    del surroundings["HOME"]
    assert told(surroundings) == [f"in {file}:2: cannot use '~/cache' as 'image-cache': HOME is not set"]


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_no_text_in_a_file_ends_in_anything_but_problems(text: str) -> None:
    reader, writer = os.pipe()
    os.write(writer, text.encode())
    os.close(writer)
    try:
        found = configuration.settings({}, f"/dev/fd/{reader}")
    finally:
        os.close(reader)
    try:
        keys = tomllib.loads(text)
    except ValueError:
        keys = {"": ""}
    assert len(found.problems) >= bool(keys.keys() - {setting.key for setting in SETTINGS})


@pytest.mark.parametrize(
    ("text", "message", "places"),
    [
        ('drive = "{0}/missing"\nsmp = 2\n', "{0}/missing", ["drive: {1}:1"]),
        ('smp = 2\ndib-library = "{0}/missing"\n', "{0}/missing", ["dib-library: {1}:2"]),
        ('image-cache = "{1}"\n', "{1}", ["image-cache: {1}:1"]),
        (
            'drive = "{1}"\nisolation = "sandbox"\n',
            "cannot use --drive with --isolation sandbox",
            ["isolation: {1}:2", "drive: {1}:1"],
        ),
    ],
    ids=["drive", "library", "cache", "two"],
)
def test_what_a_build_says_about_a_setting_is_told_with_its_place(
    text: str, message: str, places: Sequence[str], tmp_path: Path
) -> None:
    file = tmp_path / "config.toml"
    file.write_text(text.format(tmp_path, file))
    result = run("--config", str(file), "debian-minimal", environ={}, cwd=tmp_path)
    lines = result.stderr.splitlines()
    told_at = next(
        number for number, line in enumerate(lines) if "error: " in line and message.format(tmp_path, file) in line
    )
    assert lines[told_at + 1 :][: len(places)] == [f"    {place.format(tmp_path, file)}" for place in places]
    assert "smp" not in result.stderr


# ---- for other commands ----


def test_what_is_found_does_not_change_what_was_given() -> None:
    found = configuration.settings({"VIRT_DIB_SMP": "2", "VIRT_DIB_NETWORK": "off", "XDG_CONFIG_DIRS": "/nowhere"})
    assert found.values == {"cpus": Value("2", "VIRT_DIB_SMP"), "network": Value("off", "VIRT_DIB_NETWORK")}
    given_words = Given(cpus="3")
    origins = configuration.apply(given_words, found)
    assert (given_words.cpus, given_words.network, given_words.memory) == ("3", "off", None)
    assert [origins[dest] for dest in ("cpus", "network", "memory")] == ["command line", "VIRT_DIB_NETWORK", "default"]


def test_what_other_commands_do_about_kvm(surroundings: dict[str, str], user: Path) -> None:
    assert command_line.wanted_kvm(surroundings) is Kvm.AUTO
    file = write(user, "kvm = 'off'\n")
    assert command_line.wanted_kvm(surroundings) is Kvm.OFF
    assert command_line.wanted_kvm({**surroundings, "VIRT_DIB_KVM": "on"}) is Kvm.ON
    write(user, "kvm = 'of'\nsmpp = 2\n")
    with pytest.raises(UsageError) as caught:
        command_line.wanted_kvm(surroundings)
    assert [problem.message for problem in caught.value.problems] == [
        f"in {file}:2: unknown setting 'smpp'",
        f"in {file}:1: unknown value of --kvm 'of'",
    ]


def test_where_other_commands_look_for_diskimage_builder(surroundings: dict[str, str], user: Path) -> None:
    assert command_line.wanted_dib(surroundings) == (None, None)
    write(user, f"python = '{sys.executable}'\ndib-library = '/dib/lib'\n")
    assert command_line.wanted_dib(surroundings) == (Path("/dib/lib"), Path(sys.executable))
    there = command_line.wanted_dib({**surroundings, "VIRT_DIB_DIB_LIBRARY": "/other/lib"})
    assert there == (Path("/other/lib"), Path(sys.executable))
    with pytest.raises(UsageError, match="in VIRT_DIB_PYTHON: cannot use '/no/python' as --python"):
        command_line.wanted_dib({**surroundings, "VIRT_DIB_PYTHON": "/no/python"})


def test_the_doctor_tells_what_is_wrong_with_the_settings(
    user: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(user, "kvmm = 'off'\n")
    monkeypatch.setenv("VIRT_DIB_CONFIG", str(file))
    assert doctor.main([]) == 2
    assert f"virt-dib-doctor: error: in {file}:1: unknown setting 'kvmm'\n" in capsys.readouterr().err


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("on_host", [False, True], ids=["guest", "host"])
def test_elements_see_none_of_the_variables(phase: Phase, *, on_host: bool) -> None:
    variables = {setting.variable: "x" for setting in SETTINGS} | {"VIRT_DIB_CONFIG": "x", "VIRT_DIB_OTHER": "x"}
    places = OnHost(
        library_dir="/l/lib", python="/p", element_dirs={}, elements_path=(), image_cache="/c", home="/h",
        working_directory="/w", build_dir="/b",
    )  # fmt: skip
    facts = replace(facts_of(host={**variables, "OTHER": "y"}), on_host=places if on_host else None)
    seen = environment.for_phase(facts, phase)
    assert [name for name in seen if name.startswith("VIRT_DIB_")] == []
    assert ("OTHER" in seen) == (phase is Phase.EXTRA_DATA)


# ---- --show-config ----


def run(*arguments: str, environ: Mapping[str, str], cwd: Path) -> tools.Result:
    command = [sys.executable, "-m", "virt_dib", *arguments]
    path = {"PATH": os.environ["PATH"], "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    return tools.run(command, doing="running virt-dib", cwd=cwd, environment={**path, **environ}, check=False)


@pytest.mark.option("--show-config", "--config")
def test_what_show_config_prints(surroundings: dict[str, str], user: Path, tmp_path: Path) -> None:
    own = write(user, 'isolation = "sandbox"\nmemsize = 4096\nnetwork = false\nimage-cache = "~/cache"\n')
    surroundings |= {"VIRT_DIB_SMP": "3", "LIBGUESTFS_BACKEND_SETTINGS": "force_tcg"}
    result = run("--show-config", "--extra-data=host", environ=surroundings, cwd=tmp_path)
    assert (result.exit_status, result.stderr) == (0, "")
    width = len(f"{tmp_path}/cache")
    expected = [
        ("dib-library", "-", "default"),
        ("python", "-", "default"),
        ("compression", "zlib", "default"),
        ("isolation", "sandbox", f"{own}:1"),
        ("extra-data", "host", "command line"),
        ("memsize", "4096", f"{own}:2"),
        ("smp", "3", "VIRT_DIB_SMP"),
        ("timeout", "-", "default"),
        ("script-timeout", "-", "default"),
        ("network", "off", f"{own}:3"),
        ("host-certificates", "on", "default"),
        ("kvm", "off", "LIBGUESTFS_BACKEND_SETTINGS"),
        ("drive", "-", "default"),
        ("drive-format", "-", "default"),
        ("image-cache", f"{tmp_path}/cache", f"{own}:4"),
    ]
    table, _, files = result.stdout.partition("\n\n")
    assert table.splitlines() == [f"{key:17}  {text:{width}}  {origin}" for key, text, origin in expected]
    assert files == (
        f"read: {own}\nnot there: {tmp_path}/one/virt-dib/config.toml\nnot there: {tmp_path}/two/virt-dib/config.toml\n"
    )
    result = run("--show-config", "--config", str(own), environ=surroundings, cwd=tmp_path)
    assert result.stdout.endswith(f"\n\nread: {own}\n")


def test_show_config_tells_what_is_wrong_instead(surroundings: dict[str, str], user: Path, tmp_path: Path) -> None:
    own = write(user, "smp = 0\n")
    result = run("--show-config", environ=surroundings, cwd=tmp_path)
    assert (result.exit_status, result.stdout) == (2, "")
    assert result.stderr.startswith(f"virt-dib: error: in {own}:1: cannot use '0' as the number of processors\n")
    assert run("--version", environ=surroundings, cwd=tmp_path).exit_status == 0


def test_what_files_say_cannot_steer_the_terminal(
    user: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(user, 'image-cache = "/a\\u001b[2Jb\\nc"\n')
    monkeypatch.setenv("VIRT_DIB_CONFIG", str(file))
    assert cli.main(["--show-config"]) == 0
    file.write_text('"a\\u001b[2Jb\\nc" = 1\n')
    assert cli.main(["--show-config"]) == 2
    assert not any("\x1b" in text for text in capsys.readouterr())
