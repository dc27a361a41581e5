# SPDX-License-Identifier: Apache-2.0
"""Files that describe images: read as diskimage-builder reads them, and mistakes told with file, line and key."""

from __future__ import annotations

import copy
import itertools
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from diskimage_builder import diskimage_builder as dib
from hypothesis import given
from hypothesis import strategies as st

from virt_dib import image_file
from virt_dib.errors import Problem, UsageError
from virt_dib.image_file import KEYS, ImageRequest, Images, Key, Kind

Built = tuple[bool, list[str], dict[str, str]]
"""Whether a ramdisk, the arguments and the variables."""


@pytest.fixture
def write(tmp_path: Path) -> Write:
    return Write(tmp_path)


class Write:
    """Makes files of images, and reads them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._numbers = itertools.count(1)

    def __call__(self, content: str | bytes) -> Path:
        path = self._directory / f"{next(self._numbers)}.yaml"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def images(self, *contents: str | bytes) -> Images:
        return image_file.read([self(content) for content in contents])

    def requests(self, *contents: str | bytes) -> tuple[ImageRequest, ...]:
        return self.images(*contents).requests

    def problems(self, *contents: str | bytes) -> list[Problem]:
        """What is wrong, with the names of files but not of their directory."""
        with pytest.raises(UsageError) as caught:
            self.images(*contents)
        assert all(problem.hint for problem in caught.value.problems)
        return [
            Problem(problem.message.replace(f"{self._directory}/", ""), problem.hint)
            for problem in caught.value.problems
        ]

    def messages(self, *contents: str | bytes) -> list[str]:
        return [problem.message for problem in self.problems(*contents)]


def by_dib(paths: Sequence[Path]) -> list[Built]:
    """What diskimage-builder would run, found out as its own main function does."""
    definitions = []
    for path in paths:
        with path.open() as stream:
            definitions.extend(yaml.safe_load(stream))
    return [
        (Path(command.script).name == "ramdisk-image-create", command.args, command.environ)
        for command in dib.build_commands(definitions)
    ]


def by_us(paths: Sequence[Path]) -> list[Built]:
    return [
        (request.ramdisk, list(request.arguments), dict(request.environment))
        for request in image_file.read(paths).requests
    ]


def dib_refuses(paths: Sequence[Path]) -> bool:
    try:
        by_dib(paths)
    except (jsonschema.ValidationError, yaml.YAMLError, TypeError, ValueError, LookupError, AttributeError, OSError):
        return True
    return False


def we_refuse(paths: Sequence[Path]) -> bool:
    try:
        image_file.read(paths)
    except UsageError:
        return True
    return False


# ---- as diskimage-builder ----


def test_the_keys_and_what_they_want_are_those_of_diskimage_builder() -> None:
    properties = dib.SCHEMA_PROPERTIES
    assert [key.name for key in KEYS] == [prop.key for prop in dib.PROPERTIES]
    kinds: dict[Kind, dict[str, Any]] = {
        Kind.TEXT: {"type": "string"},
        Kind.FLAG: {"type": "boolean"},
        Kind.COUNT: {"type": "integer"},
        Kind.WHOLE: {"type": "integer", "minimum": 1},
        Kind.LIST: {"type": "array", "items": {"type": "string"}},
        Kind.ELEMENTS: {"type": "array", "items": {"type": "string"}},
        Kind.PAIRS: {"type": "object", "additionalProperties": {"type": "string"}},
        Kind.ENVIRONMENT: {"type": "object", "additionalProperties": {"type": "string"}},
    }
    for key in KEYS:
        schema = copy.deepcopy(kinds[key.kind])
        if key.choices:
            inner = schema["items"] if key.kind is Kind.LIST else schema
            inner["enum"] = [int(word) for word in key.choices] if key.kind is Kind.COUNT else list(key.choices)
        assert properties[key.name] == schema, key.name


VALID = {
    "one": "- imagename: a\n  elements: [x, y]\n",
    "no images": "[]\n",
    "nothing said": "- {}\n",
    "all keys": """\
- imagename: a
  arch: arm64
  types: [qcow2, raw, tgz]
  environment: {B: "2", A: "1", EMPTY: "", LINES: "a\\nb", QUOTES: "it's \\"quoted\\" $HOME"}
  ramdisk: false
  debug-trace: 2
  uncompressed: true
  clear: yes
  logfile: ./a.log
  checksum: on
  image-size: 10
  image-extra-size: 3
  image-cache: /cache with blanks
  max-online-resize: 274877906944
  min-tmpfs: 4
  mkfs-journal-size: 64
  mkfs-options: -i 16384
  no-tmpfs: true
  offline: true
  qemu-img-options: {compat: "0.10", preallocation: metadata}
  root-label: root
  ramdisk-element: dracut-ramdisk
  install-type: package
  docker-target: a:b
  packages: [vim, less]
  skip-base: true
  elements: [debian-minimal, vm, "", "two words", -u]
""",
    "empty values": """\
- imagename: ""
  types: []
  environment: {}
  logfile: ""
  qemu-img-options: {}
  packages: [""]
  debug-trace: 0
  checksum: off
  elements: []
""",
    "merging": """\
- imagename: a
  elements: [x]
  environment: {A: "1", B: "2"}
  image-size: 5
  ramdisk: true
- imagename: b
  elements: [y]
- elements: [z]
- imagename: a
  elements: [x, w]
  environment: {C: "3", A: "4"}
  image-size: 6
  ramdisk: false
  qemu-img-options: {compat: "1.1"}
- checksum: true
""",
    "without a name at first": "- elements: [a]\n- imagename: image\n  checksum: true\n- elements: [b]\n",
    "no name and an empty one": "- elements: [a]\n- imagename: ''\n  elements: [b]\n- elements: [c]\n",
    "all numbers": "- image-size: 0x10\n  min-tmpfs: 010\n  mkfs-journal-size: 1_000\n  max-online-resize: 1:30\n",
    "a whole number with a point": "- image-size: 10.0\n  max-online-resize: 1.0e+3\n",
    "tags": "- imagename: !!str 5\n  image-size: !!int '7'\n  elements: !!seq [!!str yes]\n",
    "merge key": """\
- &base
  imagename: base
  environment: &env {A: "1", B: "2"}
  elements: [x]
- <<: *base
  imagename: other
  environment: {<<: *env, B: "3", C: "4"}
""",
    "merge keys": """\
- &a {imagename: a, arch: amd64, root-label: a}
- &b {imagename: b, arch: arm64, image-size: 2}
- {<<: [*a, *b], imagename: c}
- {<<: *a, <<: *b, imagename: d}
""",
    "one that merges itself": "- &a {<<: *a, imagename: a}\n",
    "keys in quotes": "- 'imagename': a\n  \"elements\": [b]\n",
    "JSON": json.dumps([{"imagename": "a", "elements": ["b"], "environment": {"A": "\u00e9"}}]),
    "a byte order mark": "\ufeff- imagename: a\n",
    "other line ends": "- imagename: a\r\n  elements:\r\n  - b\r\n  environment:\r\n    A: |\r\n      1\r\n      2\r\n",
    "blocks": "---\n# comment\n- imagename: >-\n    a\n    b\n  mkfs-options: |\n    -O x\n    -N y\n...\n",
    "not ASCII": "- imagename: \u65e5\u672c\n  environment: {K\u00c4SE: \u00fcber}\n",
    "names no shell has": "- environment: {a-b: '1', 'c d': '2', '1': '3'}\n",
    "the words for yes and no in quotes": "- imagename: 'yes'\n  elements: ['no', \"null\", '1']\n",
    "= is a key": "- qemu-img-options: {=: y}\n",
}  # fmt: skip


@pytest.mark.parametrize("content", VALID.values(), ids=VALID)
def test_valid_files_make_the_commands_of_diskimage_builder(write: Write, content: str) -> None:
    path = write(content)
    assert by_us([path]) == by_dib([path])
    assert image_file.read([path]).warnings == ()


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(("merging", "all keys", "nothing said"), 2)))
def test_several_files_are_as_one(write: Write, first: str, second: str) -> None:
    paths = [write(VALID[first]), write(VALID[second]), write("- elements: [last]\n")]
    assert by_us(paths) == by_dib(paths)
    whole = [write(VALID[first] + VALID[second] + "- elements: [last]\n")]
    assert by_us(paths) == by_us(whole)


def test_the_same_file_twice_adds_its_lists_twice(write: Write) -> None:
    path = write("- imagename: a\n  elements: [x]\n")
    assert by_us([path, path]) == by_dib([path, path]) == [(False, ["-o", "a", "x", "x"], {})]


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
NAMES = st.text("ABC_-.\u00e9", min_size=1, max_size=4)


def value_of(key: Key) -> st.SearchStrategy[object]:
    """Values that *key* takes."""
    if key.name == "imagename":
        return st.sampled_from(["a", "b", "image", ""])
    texts: st.SearchStrategy[str] = st.sampled_from(key.choices) if key.choices else TEXTS
    values: Mapping[Kind, st.SearchStrategy[object]] = {
        Kind.TEXT: texts,
        Kind.FLAG: st.booleans(),
        Kind.COUNT: st.integers(0, 2),
        Kind.WHOLE: st.integers(1, 1 << 40),
        Kind.LIST: st.lists(texts, max_size=3),
        Kind.ELEMENTS: st.lists(TEXTS, max_size=3),
        Kind.PAIRS: st.dictionaries(NAMES, TEXTS, max_size=3),
        Kind.ENVIRONMENT: st.dictionaries(NAMES, TEXTS, max_size=3),
    }
    return values[key.kind]


ENTRIES = st.lists(st.fixed_dictionaries({}, optional={key.name: value_of(key) for key in KEYS}), max_size=4)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 12) | st.floats() | TEXTS | st.sampled_from(["qcow2", "package"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS.filter(bool), inner, max_size=3),
    max_leaves=4,
)
ODD_ENTRIES = st.lists(
    st.dictionaries(st.sampled_from([key.name for key in KEYS if key.kind is not Kind.COUNT]), ANYTHING, max_size=2)
    | ANYTHING,
    max_size=2,
)


class _Plain(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:  # noqa: ARG002 - what hypothesis has twice is not meant as an alias
        return True


def dumped(value: object, *, flow: bool | None) -> str:
    return str(yaml.dump(value, Dumper=_Plain, default_flow_style=flow, allow_unicode=flow is None))


@given(st.lists(ENTRIES, min_size=1, max_size=3), st.sampled_from([True, False, None]))
def test_any_valid_files_make_the_commands_of_diskimage_builder(files: list[object], flow: bool | None) -> None:  # noqa: FBT001 - hypothesis gives it
    with tempfile.TemporaryDirectory() as directory:
        write = Write(Path(directory))
        paths = [write(dumped(entries, flow=flow)) for entries in files]
        assert by_us(paths) == by_dib(paths)


@given(ODD_ENTRIES)
def test_both_refuse_the_same_values(entries: object) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Write(Path(directory))(dumped(entries, flow=False))
        refused = we_refuse([path])
        # That is refused only when a build starts.
        odd_name = any(
            "=" in name
            for entry in yaml.safe_load(path.read_text())
            if isinstance(entry, dict) and isinstance(entry.get("environment"), dict)
            for name in entry["environment"]
        )
        assert refused == dib_refuses([path]) or (refused and odd_name)


BOTH_REFUSE = {
    "nothing": "",
    "a comment": "# nothing yet\n",
    "null": "~\n",
    "a word": "image\n",
    "a map": "imagename: a\n",
    "a list of words": "- a\n",
    "a list of lists": "- [a]\n",
    "null for an image": "-\n",
    "an unknown key": "- image: a\n",
    "a key that is a number": "- 5: a\n",
    "a key that is a list": "- ? [a]\n  : b\n",
    "number for text": "- imagename: 5\n",
    "bool for text": "- imagename: yes\n",
    "null for text": "- imagename:\n",
    "date for text": "- imagename: 2020-01-01\n",
    "date that is none": "- imagename: 2020-99-99\n",
    "list for text": "- imagename: [a]\n",
    "text for bool": "- checksum: 'true'\n",
    "number for bool": "- checksum: 1\n",
    "text for number": "- image-size: '5'\n",
    "bool for number": "- image-size: true\n",
    "zero": "- image-size: 0\n",
    "a fraction": "- image-size: 1.5\n",
    "infinity": "- image-size: .inf\n",
    "not a number": "- image-size: .nan\n",
    "text for list": "- elements: a b\n",
    "map for list": "- elements: {a: b}\n",
    "null for list": "- elements:\n",
    "number in list": "- elements: [a, 5]\n",
    "list in list": "- elements: [[a]]\n",
    "a set for a map": "- environment: !!set {a}\n",
    "list for map": "- environment: [A=1]\n",
    "number in map": "- environment: {A: 1}\n",
    "null in map": "- environment: {A: }\n",
    "map in map": "- qemu-img-options: {a: {b: c}}\n",
    "unknown arch": "- arch: i386\n",
    "unknown type": "- types: [vmdk]\n",
    "type in one word": "- types: qcow2,raw\n",
    "unknown install type": "- install-type: binary\n",
    "too much tracing": "- debug-trace: 3\n",
    "bool for tracing": "- debug-trace: true\n",
    "negative tracing": "- debug-trace: -1\n",
    "two documents": "- imagename: a\n---\n- imagename: b\n",
    "tab": "- imagename: a\n\telements: [b]\n",
    "unclosed": "- elements: [a\n",
    "bad alias": "- elements: *nowhere\n",
    "unknown tag": "- imagename: !mine a\n",
    "python": "- imagename: !!python/object/apply:os.getcwd []\n",
    "broken int": "- image-size: !!int x\n",
    "broken bool": "- checksum: !!bool maybe\n",
    "broken empty int": "- image-size: !!int ''\n",
    "broken timestamp": "- imagename: !!timestamp x\n",
    "underscores": "- image-size: 0x_\n",
    "bytes": "- imagename: !!binary aGFsbG8=\n",
    "merging a word": "- {<<: a}\n",
    "merging a list of words": "- {<<: [a]}\n",
    "<< as a value": "- imagename: <<\n",
    "= as a value": "- imagename: =\n",
    "control character": "- imagename: a\x07\n",
    "a number without end": "- image-size: " + "9" * 5000 + "\n",
    "nested without end": "[" * 100_000,
}


@pytest.mark.parametrize("content", BOTH_REFUSE.values(), ids=BOTH_REFUSE)
def test_what_diskimage_builder_refuses_is_refused(write: Write, content: str) -> None:
    path = write(content)
    if content[:2] != "[[":  # which ends it with a RecursionError
        assert dib_refuses([path])
    problems = write.problems(content)
    assert len(problems) == 1
    assert problems[0].message.startswith(("2.yaml:", "reading '2.yaml': "))


WE_REFUSE = {
    "a key twice": ("- imagename: a\n  imagename: b\n", "2.yaml:2: key 'imagename' is there twice, first in line 1"),
    "a variable twice": (
        "- environment:\n    A: '1'\n    A: '2'\n", "2.yaml:3: key 'A' is there twice, first in line 2"
    ),
    "an empty map for a list": ("{}\n", "2.yaml:1: a map where a list of images belongs"),
    "an empty word for a list": ("''\n", "2.yaml:1: the text '' where a list of images belongs"),
    "a name that is a number": (
        "- environment: {5: a}\n", "2.yaml:1: the number 5 where the name of a key belongs"
    ),
    "a name that is a bool": (
        "- qemu-img-options: {on: a}\n", "2.yaml:1: on, which is true where the name of a key belongs"
    ),
    "a name without letters": (
        "- environment: {'': a}\n", "2.yaml:1: key 'environment', name '': cannot use this name: it is empty"
    ),
    "a name with =": (
        "- environment: {A=B: a}\n",
        "2.yaml:1: key 'environment', name 'A=B': cannot use this name: there is a '=' in it",
    ),
    "a NUL": (
        '- elements: [a, "b\\0"]\n', "2.yaml:1: key 'elements', number 2: cannot use 'b\0': there is a NUL in it"
    ),
    "half a pair": (
        '- imagename: "\\ud800"\n',
        "2.yaml:1: key 'imagename': cannot use '\ud800': there is half of a surrogate pair in it",
    ),
    "beyond all sizes": (
        "- image-size: 1.0e+300\n",
        "2.yaml:1: key 'image-size' wants a whole number of 1 or more, not the number 1.0e+300",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("content", "message"), WE_REFUSE.values(), ids=WE_REFUSE)
def test_what_diskimage_builder_takes_by_accident_is_a_mistake(write: Write, content: str, message: str) -> None:
    assert not dib_refuses([write(content)])
    assert write.messages(content) == [message]


def test_tracing_with_a_point_is_a_number_too(write: Write) -> None:
    # For diskimage-builder's schema as well, but then it ends with a TypeError.
    assert write.requests("- debug-trace: 2.0\n")[0].arguments == ("-x", "-x")


# ---- what an image is ----


def test_a_request_has_its_name_log_and_place(write: Write) -> None:
    first = write("# images\n- elements: [a]\n  logfile: x.log\n- imagename: b\n  ramdisk: true\n")
    second = write("- imagename: image\n  logfile: y.log\n- imagename: ''\n  elements: [c]\n")
    requests = image_file.read([first, second]).requests
    assert [(request.name, request.ramdisk, request.logfile, request.origin) for request in requests] == [
        ("image", False, "y.log", f"{first}:2"),
        ("b", True, None, f"{first}:4"),
        ("image", False, None, f"{second}:3"),
    ]
    assert requests[0].arguments == ("-o", "image", "--logfile", "y.log", "a")
    assert requests[2].arguments == ("c",)


def test_a_list_that_several_have_by_an_alias_grows_for_one_of_them(write: Write) -> None:
    content = "- &a {imagename: a, elements: [x]}\n- {<<: *a, imagename: b}\n- {imagename: a, elements: [y]}\n"
    images = write.images(content)
    assert [request.arguments for request in images.requests] == [("-o", "a", "x", "y"), ("-o", "b", "x")]
    assert by_dib([write(content)])[1] == (False, ["-o", "b", "x", "y"], {})
    (warning,) = images.warnings
    assert warning.endswith(
        "1.yaml:3: adding to 'elements' of 'a' alone; diskimage-builder would add to all that have the same list or "
        "map by an alias"
    )


def test_a_map_too_and_one_warning_for_each(write: Write) -> None:
    images = write.images(
        "- &a {imagename: a, environment: {A: '1'}}\n- {<<: *a, imagename: b}\n"
        "- {imagename: b, environment: {B: '2'}}\n- environment: {C: '3'}\n"
    )
    assert [dict(request.environment) for request in images.requests] == [{"A": "1"}, {"A": "1", "B": "2", "C": "3"}]
    assert len(images.warnings) == 1


def test_an_entry_that_is_there_again_by_an_alias_adds_its_lists_again(write: Write) -> None:
    images = write.images("- &a {imagename: a, elements: [x]}\n- *a\n- *a\n")
    assert [request.arguments for request in images.requests] == [("-o", "a", "x", "x", "x")]


# ---- mistakes ----


def test_all_mistakes_of_all_files_are_told_in_their_order(write: Write) -> None:
    first = """\
- imagename: a
  type: [qcow2]
  elements: vm
  environment:
    DIB_SIZE: 5
    DIB_OK: "yes"
- images
- checksum: yes please
  image-size: "5"
  types: [qcow, raw, tar, targz]
  elements: [a]
  elements: [b]
"""
    assert write.problems(first, b"- imagename: caf\xe9\n", "- imagename: good\n", "a: [", "") == [
        Problem("1.yaml:2: unknown key 'type'", "did you mean 'types'?"),
        Problem(
            "1.yaml:3: key 'elements' wants a list of names of elements, not the text 'vm'",
            "write it as a list: [vm]",
        ),
        Problem(
            "1.yaml:5: key 'environment', name 'DIB_SIZE' wants a text, not the number 5", 'put it in quotes: "5"'
        ),
        Problem(
            "1.yaml:7: the text 'images' where the map of an image belongs", "write NAME: VALUE, one on each line"
        ),
        Problem(
            "1.yaml:8: key 'checksum' wants true or false, not the text 'yes please'",
            "write checksum: true, or leave it out",
        ),
        Problem(
            "1.yaml:9: key 'image-size' wants a whole number of 1 or more, not the text '5'", "write it without quotes"
        ),
        Problem(
            "1.yaml:10: key 'types', number 1: 'qcow' is not one of qcow2, tar, tgz, squashfs, vhd, docker, aci, raw",
            "did you mean 'qcow2'?",
        ),
        Problem(
            "1.yaml:10: key 'types', number 4: 'targz' is not one of qcow2, tar, tgz, squashfs, vhd, docker, aci, raw",
            "did you mean 'tgz'?",
        ),
        Problem("1.yaml:12: key 'elements' is there twice, first in line 11", "take one of them out"),
        Problem("2.yaml:1: not UTF-8", "write it in UTF-8; YAML is text"),
        Problem(
            "4.yaml:1: not YAML: expected the node content, but found '<stream end>'",
            "see the quotes and the indentation there",
        ),
        Problem("reading '5.yaml': it is empty", "write a list of images: - imagename: NAME"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message", "hint"),
    [
        ("- imagename: yes", "key 'imagename' wants a text, not yes, which is true", 'put it in quotes: "yes"'),
        ("- imagename: true", "key 'imagename' wants a text, not true", 'put it in quotes: "true"'),
        ("- logfile:", "key 'logfile' wants a text, not nothing", 'leave it out, or write ""'),
        (
            "- root-label: 2020-01-01",
            "key 'root-label' wants a text, not '2020-01-01', which YAML takes for something else",
            'put it in quotes: "2020-01-01"',
        ),
        ("- packages: [a, [b]]", "key 'packages', number 2 wants a text, not a list", "give one text"),
        ("- packages: {a: b}", "key 'packages' wants a list of texts, not a map", "begin each of them with '- '"),
        ("- image-size: 0", "key 'image-size' wants a whole number of 1 or more, not the number 0", None),
        ("- debug-trace: 7", "key 'debug-trace' wants one of 0, 1, 2, not 7", "take one of them"),
        ("- install-type: sources", "key 'install-type': 'sources' is not one of source, package", None),
        ("- 5: a", "the number 5 where the name of a key belongs", 'put it in quotes: "5"'),
        ("- zzz: a", "unknown key 'zzz'", None),
        ("- {<<: 5}", "the number 5 where a map to merge belongs", None),
        ("- a\n\tb", "not YAML: found character '\\t' that cannot start any token", None),
        ("- []\n---\n[]", "a second document begins here", "write all images into one list, or several files"),
        ("- imagename: a\x1bb", "not YAML: a character that is not allowed", None),
        ('- logfile: "\\U00110000"', "reading '1.yaml': not YAML: there is too large a number in it", None),
        ('- logfile: "\\UFFFFFFFF"', "reading '1.yaml': not YAML: there is too large a number in it", None),
        ("%YAML 1." + "9" * 5000 + "\n---\n[]", "reading '1.yaml': not YAML: there is too large a number in it", None),
        ("- " + "k" * 200 + ": a", "unknown key '" + "k" * 59 + "\u2026'", None),
        ("[" * 9999, "reading '1.yaml': lists and maps are nested too deeply", "is this a file of images?"),
    ],
)  # fmt: skip
def test_a_mistake_in_words(write: Write, content: str, message: str, hint: str | None) -> None:
    (problem,) = write.problems(content)
    assert problem.message.split(": ", 1)[1] == message or problem.message == message
    assert problem.hint == hint or hint is None


def test_the_line_is_that_of_the_value_not_of_its_alias(write: Write) -> None:
    content = "- imagename: a\n  elements: &e [x, 5]\n- imagename: b\n  elements: *e\n- imagename: c\n  packages: *e\n"
    assert write.messages(content) == [
        "1.yaml:2: key 'elements', number 2 wants a text, not the number 5",
        "1.yaml:2: key 'packages', number 2 wants a text, not the number 5",
    ]


def test_the_line_after_other_line_ends(write: Write) -> None:
    assert write.messages("- {}\r\n- {}\r\n- a\r\n") == ["1.yaml:3: the text 'a' where the map of an image belongs"]
    assert write.messages(b"- {}\n- \xff\n") == ["2.yaml:2: not UTF-8"]


def test_a_key_that_overrides_a_merged_one_is_not_there_twice(write: Write) -> None:
    assert write.requests("- &a {imagename: a}\n- {<<: *a, imagename: b}\n")[1].name == "b"


def test_a_very_wrong_file_is_told_in_part(write: Write) -> None:
    problems = write.problems("- a\n" * 5000)
    assert len(problems) == 101
    assert problems[-1].message == "4900 more mistakes in these files"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "dir").mkdir()
    os.mkfifo(tmp_path / "fifo")
    paths = [tmp_path / "none.yaml", tmp_path / "dir", tmp_path / "fifo", Path("/dev/zero"), Path("a\0b")]
    with pytest.raises(UsageError) as caught:
        image_file.read(paths)
    assert [problem.message for problem in caught.value.problems] == [
        f"reading '{tmp_path}/none.yaml': No such file or directory",
        f"reading '{tmp_path}/dir': Is a directory",
        f"reading '{tmp_path}/fifo': it is a FIFO that nobody writes to",
        "reading '/dev/zero': larger than 4 MiB",
        "reading 'a\0b': there cannot be such a file",
    ]


# ---- aliases without end ----

TOO_LONG = ["reading '1.yaml': with its aliases followed it is longer than 4 MiB"]


def bomb(first: str, line: str) -> str:
    """Nine anchors, each of ten of the one before it."""
    lines = [f"&a0 {first}", *(line.format(n=n, before=", ".join([f"*a{n - 1}"] * 10)) for n in range(1, 10))]
    return "- x-bombs: [" + ",\n".join(lines) + "]\n  elements: *a9\n"


def test_lists_of_lists_of_lists_are_no_bomb(write: Write) -> None:
    messages = write.messages(bomb("[x, x]", "&a{n} [{before}]"))
    assert "1.yaml:1: unknown key 'x-bombs'" in messages
    assert len(messages) == 11


def test_merges_of_merges_are_no_bomb(write: Write) -> None:
    maps = [f"- environment: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}], K{n}: v}}\n" for n in range(1, 40)]
    (request,) = write.requests("- environment: &a0 {K0: v}\n" + "".join(maps))
    assert len(request.environment) == 40


LONG = ", ".join(["x"] * 20_000)
PAIRS = ", ".join(f"k{n}: v" for n in range(10_000))
QUADRATIC = {
    "one image": f"- elements: &e [{LONG}]\n" + "- elements: *e\n" * 20_000,
    "many images": f"- elements: &e [{LONG}]\n"
    + "".join(f"- {{imagename: n{n}, elements: *e}}\n" for n in range(9999)),
    "entries": f"- &e {{elements: [{LONG}]}}\n" + "- *e\n" * 20_000,
    "a long text": f"- imagename: &s {'x' * 100_000}\n  elements: [{', '.join(['*s'] * 20_000)}]\n",
    "maps": f"- environment: &m {{{PAIRS}}}\n" + "- environment: {<<: *m}\n" * 5000,
    "one map": f"- environment: &m {{{PAIRS}}}\n- environment:\n" + "    <<: *m\n" * 5000,
}


@pytest.mark.parametrize("content", QUADRATIC.values(), ids=QUADRATIC)
def test_long_things_many_times_are_refused(write: Write, content: str) -> None:
    assert write.messages(content) == TOO_LONG


def test_a_long_chain_of_merges_is_refused(write: Write) -> None:
    chain = ", ".join(f"&a{n} {{<<: *a{n - 1}}}" for n in range(1, 3000))
    messages = write.messages(f"- x: [&a0 {{}}, {chain}]\n  environment: *a2999\n")
    assert messages == ["reading '1.yaml': lists and maps are nested too deeply"]


def test_anchors_that_hold_themselves(write: Write) -> None:
    assert write.messages("&a [*a]\n") == ["1.yaml:1: a list where the map of an image belongs"]
    assert write.messages("- elements: &a [*a, b]\n") == ["2.yaml:1: key 'elements', number 1 wants a text, not a list"]
    assert write.messages("- environment: &a {A: *a}\n") == [
        "3.yaml:1: key 'environment', name 'A' wants a text, not a map"
    ]
