# SPDX-License-Identifier: Apache-2.0
"""Messages in the language of who reads them, and in English everywhere else."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import string
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from generate import catalogue
from virt_dib import boot_cli, dib_command, dib_links, doctor, image_file, image_file_cli, options, tools
from virt_dib.dib_command import DISK_PROG, RAMDISK_PROG
from virt_dib.events import Event, to_all
from virt_dib.monitor import BuildMonitor, Display, summary
from virt_dib.options import BY_NAME
from virt_dib.report import BuildReport, PhaseResult
from virt_dib.spec import BuildSpec
from virt_dib.terminal import columns_of
from virt_dib.translation import Catalogue, translated

LANGUAGES = [path.stem for path in sorted(catalogue.PO_DIR.glob("*.po"))]
FRONT = (
    "batch", "boot_cli", "cli", "command_line", "configuration", "dib_cli", "dib_command", "dib_links", "dib_output",
    "doctor", "events", "image_file", "image_file_cli", "monitor", "options", "prerequisites", "spec", "usage",
)  # fmt: skip
"""Modules whose messages are translated whole. Of all messages nine in ten are."""
JAPANESE = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]")


def run(*arguments: str, cwd: Path, **environment: str) -> tools.Result:
    surroundings = {"PATH": os.environ["PATH"], **environment}
    command = [sys.executable, "-m", "virt_dib", *arguments]
    return tools.run(command, doing="running virt-dib", cwd=cwd, environment=surroundings, check=False)


def placeholders(text: str) -> list[str]:
    return sorted(name for _, name, _, _ in string.Formatter().parse(text) if name is not None)


def without_names(text: str) -> str:
    return text.format_map(dict.fromkeys(placeholders(text), "*"))


def translations(language: str) -> dict[str, str]:
    """Messages and their translations, as in po/."""
    found = catalogue.read(catalogue.PO_DIR / f"{language}.po")
    return {str(entry.id): str(entry.string) for entry in found if entry.id}


@pytest.fixture
def in_japanese(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANGUAGE", "ja")


# ---- the command ----


@pytest.mark.option("--help")
@pytest.mark.parametrize(
    "environment",
    [
        {"LANGUAGE": "ja", "LC_ALL": "C.UTF-8"},
        {"LC_ALL": "ja_JP.UTF-8", "PYTHONUTF8": "1"},
        {"LANG": "ja_JP.UTF-8", "PYTHONUTF8": "1"},
    ],
    ids=" ".join,
)
def test_the_help_is_in_japanese_and_aligned(environment: dict[str, str], tmp_path: Path) -> None:
    text = run("--help", cwd=tmp_path, COLUMNS="80", **environment).stdout
    assert text.startswith("使い方: virt-dib [オプション] ELEMENT...\n")
    assert max(map(columns_of, text.splitlines())) < 90
    described = text[text.index("\n作成するもの:\n") : text.index("\n例:\n")]
    column = columns_of(described[: described.index("イメージの名前")].splitlines()[-1])
    for line in described.splitlines():
        # A text, or an option with or without a text beside it.
        assert not line.startswith(" " * column) or line[column] != " ", line
        assert not line.startswith("  -") or len(line) <= column or re.search(r"^(?=.{22}  \S)|^[ -~]*$", line), line
    assert all(name in described for name in BY_NAME)
    untranslated = [
        line for line in re.sub(r"\n {20,}", "", described).splitlines() if line and not JAPANESE.search(line)
    ]
    # Options alone on their line; their text is on the next.
    assert [line for line in untranslated if not line.startswith("  -")] == []


def words_of(parser: argparse.ArgumentParser) -> Iterator[str]:
    """All that the help says in words."""
    yield from filter(None, (parser.description, parser.epilog))
    for group in parser._action_groups:  # noqa: SLF001 - argparse's one list of groups
        if group._group_actions:  # noqa: SLF001 - likewise
            yield from filter(None, (group.title, *(action.help for action in group._group_actions)))  # noqa: SLF001 - no other way


@pytest.mark.parametrize(
    "build_parser",
    [
        options.build_parser, doctor.build_parser, boot_cli.build_parser, dib_links.build_parser,
        image_file_cli.build_parser, partial(dib_command.build_parser, DISK_PROG),
        partial(dib_command.build_parser, RAMDISK_PROG),
    ],
)  # fmt: skip
def test_no_sentence_of_a_help_is_in_english(
    build_parser: Callable[[], argparse.ArgumentParser], monkeypatch: pytest.MonkeyPatch
) -> None:
    english = {"".join(text.split()) for text in words_of(build_parser()) if " " in text}
    assert len(english) >= 3
    monkeypatch.setenv("LANGUAGE", "ja")
    monkeypatch.setenv("COLUMNS", "80")
    parser = build_parser()
    shown = parser.format_help()
    assert [text for text in words_of(parser) if not JAPANESE.search(text)] == []
    assert [text for text in english if text in "".join(shown.split())] == []
    assert max(map(columns_of, shown.splitlines())) < 90
    assert shown.startswith("使い方: ")


@pytest.mark.usefixtures("in_japanese")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--timeout"], "引数 --timeout: 値が 1 つ必要です"),
        (["--frob", "x"], "不明な引数: --frob"),
        (["--uefi", "--bios", "x"], "引数 --bios は引数 --uefi と同時に指定できません"),
        ([], "IMAGE か、--kernel と --initrd を指定してください"),
    ],
)
def test_wrong_usage_is_told_in_japanese(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert boot_cli.main(arguments) == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith(f"virt-dib-boot-test: エラー: {said}")
    assert hint == "virt-dib-boot-test: ヒント: すべてのオプションは 'virt-dib-boot-test --help' で表示されます"


def test_errors_and_hints_are_in_japanese_with_the_values_as_they_are(tmp_path: Path) -> None:
    result = run("--size", "5", "--kvm", "sandbox", "debain-minimal", cwd=tmp_path, LANGUAGE="ja", LC_ALL="C.UTF-8")
    assert result.exit_status == 2
    lines = result.stderr.splitlines()
    assert "virt-dib: エラー: '5' をイメージのサイズとして使えません" in lines
    assert "virt-dib: エラー: --kvm の値が不明です: 'sandbox'" in lines
    assert "virt-dib: エラー: エレメント 'debain-minimal' が見つかりません" in lines
    assert all(line.startswith(("virt-dib: エラー: ", "virt-dib: ヒント: ")) for line in lines)


WRONG_IMAGES = """\
- imagename: 5
  typse: [qcow2]
- types: [qcow2, qwoc2]
  environment: {A B: x, C: [y]}
  debug-trace: 7
  uncompressed: maybe
- elements: raw
- 3
"""


@pytest.mark.usefixtures("in_japanese")
@pytest.mark.parametrize(
    ("text", "japanese"),
    [
        ("choose from auto, on, off", "次から選んでください: auto, on, off"),
        ("cannot use '' as the disk image of --drive", "'' を --drive のディスクイメージとして使えません"),
        ("give an existing directory", "存在するディレクトリーを指定してください"),
        ("did you mean either 'a' or 'b'? searched /x", "'a' または 'b' のことですか。検索した場所: /x"),
        ("add one, such as 'a', 'b' or 'c'", "次のようなものを加えてください: 'a', 'b' または 'c'"),
        ("cannot use 'soon' as the value of --timeout", "'soon' を --timeout の値として使えません"),
        ("the following arguments are required: DIRECTORY", "次の引数が必要です: DIRECTORY"),
    ],
)
def test_messages_with_words_in_them(text: str, japanese: str) -> None:
    assert translated(text) == japanese


@pytest.mark.usefixtures("in_japanese")
def test_what_is_wrong_in_a_file_of_images_is_told_in_japanese(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(WRONG_IMAGES)
    assert image_file_cli.main(["--jobs", "many", str(path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    said = [line.removeprefix(f"virt-diskimage-builder: エラー: {path}:") for line in lines]
    for text in (
        "1: キー 'imagename' には テキスト が必要ですが、数値 5 があります",
        "2: 不明なキー 'typse'",
        "3: キー 'types' の 2 番目: 'qwoc2' は qcow2, tar, tgz, squashfs, vhd, docker, aci, raw のどれでもありません",
        "4: キー 'environment' の名前 'C' には テキスト が必要ですが、リスト があります",
        "5: キー 'debug-trace' には 0, 1, 2 のどれかが必要ですが、7 があります",
        "6: キー 'uncompressed' には true か false が必要ですが、テキスト 'maybe' があります",
        "7: キー 'elements' には エレメントの名前のリスト が必要ですが、テキスト 'raw' があります",
        "8: 数値 3 がありますが、ここは イメージのマップ であるはずです",
    ):
        assert text in said
    assert "virt-diskimage-builder: エラー: 'many' を --jobs の値として使えません" in lines
    assert [line for line in lines if not JAPANESE.search(line.split(": ", 2)[2])] == []


@pytest.mark.usefixtures("in_japanese")
def test_the_help_on_files_of_images_has_its_keys_below_each_other(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        image_file_cli.main(["--help"])
    shown = capsys.readouterr().out
    assert shown.startswith("使い方: virt-diskimage-builder [オプション] FILE...\n")
    table = shown[shown.index("イメージのキー:\n") : shown.index("\n\n終了ステータス")].splitlines()[1:]
    keys = {line.split()[0]: line for line in table if not line.startswith("   ")}
    assert keys.keys() == {key.name for key in image_file.KEYS}
    columns = {len(line) - len(re.sub(r"^  \S* +", "", line)) for line in table}
    assert len(columns) == 1
    assert max(map(columns_of, table)) <= 80


def test_a_drop_in_tells_in_its_own_words_in_japanese(tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "LANGUAGE": "ja", "LC_ALL": "C.UTF-8"}
    command = [sys.executable, "-m", "virt_dib.dib_cli", "-t", ","]
    result = tools.run(command, doing="asking", cwd=tmp_path, environment=environment, check=False)
    assert "virt-disk-image-create: エラー: -t に形式が指定されていません" in result.stderr.splitlines()
    assert "例: virt-disk-image-create -o debian debian-minimal vm" in result.stderr


@pytest.mark.parametrize("language", ["xx", "en", ""])
def test_other_languages_read_english(language: str, tmp_path: Path) -> None:
    result = run("--size", "5", "debian-minimal", cwd=tmp_path, LANGUAGE=language, LC_ALL="C.UTF-8")
    assert "virt-dib: error: cannot use '5' as the size of the image\n" in result.stderr


def test_machine_readable_output_stays_english(tmp_path: Path) -> None:
    arguments = ["--machine-readable", "--size", "5", "debian-minimal"]
    result = run(*arguments, cwd=tmp_path, LANGUAGE="ja", LC_ALL="C.UTF-8")
    messages = [json.loads(line)["message"] for line in result.stdout.splitlines()]
    assert "cannot use '5' as the size of the image" in messages
    assert "エラー" in result.stderr


@pytest.mark.usefixtures("in_japanese")
def test_a_build_is_shown_in_japanese_and_logged_and_told_in_english(tmp_path: Path) -> None:
    stream, told = io.StringIO(), list[Event]()
    with Display(stream) as display:
        monitor = BuildMonitor(to_all([display, told.append]))
        spec = BuildSpec(name="d", output_dir=tmp_path, elements=("vm",))
        with monitor.following(spec), monitor.logging(tmp_path / "log"):
            monitor.phase_started("copying the tree", [])
            monitor.output(b"copying the tree\n")
            monitor.warning("cannot write 'copying the tree': full")
    lines = [re.sub(r"^\[ *[0-9.]+\] ", "", line) for line in stream.getvalue().splitlines()]
    assert lines == ["ツリーのコピー", "copying the tree", "警告: 'copying the tree' に書き込めません: full"]
    assert not JAPANESE.search((tmp_path / "log").read_text())
    assert not any(JAPANESE.search(event.line or "") for event in told)


@pytest.mark.usefixtures("in_japanese")
def test_the_summary_is_in_japanese_and_aligned() -> None:
    phases = [PhaseResult(title=title, seconds=1.5) for title in ("root.d", "copying the tree")]
    text = summary(BuildReport(name="d", phases=phases, artifacts=(), seconds=3.0))
    rows = text.rstrip().splitlines()
    assert "ツリーのコピー" in text
    assert len({columns_of(row) for row in rows}) == 1


# ---- the catalogues ----


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_catalogue_is_complete_and_has_the_placeholders_of_the_messages(language: str) -> None:
    assert not any(entry.fuzzy for entry in catalogue.read(catalogue.PO_DIR / f"{language}.po") if entry.id)
    entries = translations(language)
    assert [text for text, translation in entries.items() if not translation] == []
    assert [text for text, translation in entries.items() if placeholders(text) != placeholders(translation)] == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_catalogue_has_the_messages_of_the_sources(language: str) -> None:
    modules = sorted(catalogue.PACKAGE_DIR.glob("*.py"))
    found = {path.stem: [text for _, text in catalogue.messages(path)] for path in modules}
    missing = {text for texts in found.values() for text in texts} - translations(language).keys()
    hint = f"run 'python -m generate.catalogue', and translate what has no msgstr in po/{language}.po"
    assert [text for module in FRONT for text in found[module] if text in missing] == [], hint
    assert len(missing) <= sum(map(len, found.values())) / 10, hint


@pytest.mark.parametrize("language", LANGUAGES)
def test_each_message_with_values_finds_its_own_translation(language: str) -> None:
    entries = translations(language)
    whole = Catalogue(entries)
    for text, translation in entries.items():
        values = {name: f"<{name}>" for name in placeholders(text)}
        others = [other for key, other in entries.items() if without_names(key) == without_names(text)]
        # Two that differ in the names of placeholders alone are one to the reader.
        assert whole.translated(text.format_map(values)) == translation.format_map(values) or len(others) > 1


def test_a_text_that_is_no_message_is_left_as_it_is() -> None:
    assert translated("no message of ours") == "no message of ours"


SMALL = Catalogue(
    {"'{a}' and {b} failed: {c}": "{c} <- {b}, '{a}'", "the other": "der andere", "{{x}} {y}": "{y} {{x}}"}
)


@given(st.text(max_size=20), st.text(max_size=20), st.text(max_size=20))
def test_values_come_through_whatever_they_are(a: str, b: str, c: str) -> None:
    text = SMALL.translated(f"'{a}' and {b} failed: {c}")
    assert sorted(text) == sorted(f"{c} <- {b}, '{a}'") or "failed" in a + b + c or "the other" in (b, c)


def test_a_value_is_translated_unless_it_is_in_quotes() -> None:
    assert SMALL.translated("'the other' and the other failed: why") == "why <- der andere, 'the other'"
    assert SMALL.translated("{x} the other") == "der andere {x}"


def test_a_hostile_text_takes_no_time() -> None:
    text = "'" + "' and ' failed: " * 20_000
    assert SMALL.translated(text + "x").startswith("' and ' failed: ")
