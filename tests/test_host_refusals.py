# SPDX-License-Identifier: Apache-2.0
"""What the host refuses where that is no error: the answer is then the one that does no harm."""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
from pathlib import Path

import pytest

from test_host_failures import in_namespace
from virt_dib import elements, log_file, masking, namespaces, ownership, scripts
from virt_dib.errors import Interrupted
from virt_dib.interrupts import interrupts
from virt_dib.terminal_link import Terminal


def test_a_path_that_no_file_can_have_is_no_path() -> None:
    assert masking.shown("API_TOKEN", "/\0") != "/\0"


def test_what_cannot_be_read_begins_with_nothing(tmp_path: Path) -> None:
    assert scripts._beginning(tmp_path, 10) == b""
    assert scripts._beginning(tmp_path / "nothing", 10) == b""


def test_no_list_of_subordinate_ids_is_an_empty_one(tmp_path: Path) -> None:
    assert list(namespaces._entries(tmp_path / "subuid")) == []


def test_a_program_that_has_gone_has_no_capabilities(tmp_path: Path) -> None:
    assert not namespaces._has_capabilities(tmp_path / "newuidmap")


def test_a_file_without_locks_is_free(tmp_path: Path) -> None:
    (tmp_path / "log").touch()
    # Of such a descriptor the kernel locks nothing.
    descriptor = os.open(tmp_path / "log", os.O_PATH)
    try:
        assert log_file._try_lock(descriptor)
    finally:
        os.close(descriptor)


def test_a_log_that_somebody_else_has_made_meanwhile_stays(tmp_path: Path) -> None:
    for name in ("log", "partial"):
        (tmp_path / name).write_text(name)
    assert not log_file._link(tmp_path / "partial", tmp_path / "log")
    assert (tmp_path / "log").read_text() == "log"


def test_a_file_system_without_links_gets_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    (tmp_path / "partial").write_text("log")
    monkeypatch.setattr(os, "link", refuse)
    assert log_file._link(tmp_path / "partial", tmp_path / "log")
    assert (tmp_path / "log").read_text() == "log"
    assert not (tmp_path / "partial").exists()


def test_a_directory_that_cannot_be_listed_is_told_later(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").touch()
    assert not elements.strange(tmp_path / "elsewhere", [tmp_path / "elements"])


def test_a_file_system_without_access_lists_has_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    state = (tmp_path / "file").stat()
    with contextlib.suppress(KeyError):
        # The mode of a group that is the user's own counts; the file has gone since.
        if grp.getgrgid(state.st_gid).gr_name == pwd.getpwuid(state.st_uid).pw_name:
            assert ownership._is_own_group(tmp_path / "gone", state)


def test_a_kernel_that_does_not_tell_who_nobody_is() -> None:
    code = 'from virt_dib import ownership\nprint(ownership._is_of_the_host(os.stat("/")))\n'
    assert in_namespace("mount --bind /dev/null /proc/sys/kernel/overflowuid", code) == "False\n"


def test_a_terminal_that_has_gone_ends_the_build() -> None:
    reader, writer = os.pipe()
    os.close(writer)
    os.close(reader)
    with pytest.raises(Interrupted):
        Terminal(reader=reader).read()
    with interrupts():
        pass  # and it has not been interrupted any more
