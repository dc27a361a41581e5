# SPDX-License-Identifier: Apache-2.0
"""A guest that answers as tests have it, in the place of an appliance: its programs are the elements' to replace."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from virt_dib import tools
from virt_dib.errors import ApplianceError
from virt_dib.jobs import Event, JobResult, Splitter, Tail
from virt_dib.sandbox import Extent
from virt_dib.terminal_link import Terminal


@dataclass(kw_only=True)
class Guest:
    """A place in which a command is whatever bash text there is for its first words; without one it succeeds."""

    directory: Path
    commands: Mapping[str, str] = field(default_factory=dict)
    """By the name of a program, or that and its first argument."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """What is read there, by the last part of the path."""
    phases: frozenset[str] = frozenset()
    """Those that have scripts."""
    killed_hint: str = "have a look at the memory"
    full_hint: str = "have a look at the disk"

    def run(
        self,
        command: Sequence[str],
        variables: Mapping[str, str],
        cwd: str,
        *,
        functions: str = "",
        on_output: Callable[[bytes], None] | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> JobResult:
        del variables, cwd, functions
        words = [Path(word).name for word in command if word not in ("/usr/bin/python3", "-I", "-S")]
        text = self.commands.get(" ".join(words[:2]), self.commands.get(words[0]))
        if text is None:
            return JobResult(exit_status=0, tail="")
        result = tools.run(["/bin/bash", "-c", text], doing="answering", cwd=self.directory, check=False)
        tail, splitter = Tail(), Splitter(b"T")
        for piece in splitter.feed((result.stdout + result.stderr).encode()):
            if isinstance(piece, bytes):
                (on_output or tail.add)(piece)
            elif on_event is not None:
                on_event(piece)
        return JobResult(exit_status=result.exit_status, tail=tail.text())

    def shell(self, *_: object, terminal: Terminal, **__: object) -> int:
        """There is none."""
        del terminal
        raise ApplianceError("running a shell: it ended without a word")

    def is_directory(self, path: str) -> bool:
        return Path(path).name in self.phases

    def read(self, path: str, *, limit_bytes: int = 1 << 20) -> bytes:
        return self.files[Path(path).name][:limit_bytes]

    def write(self, path: str, data: bytes) -> None:
        (self.directory / Path(path).name).write_bytes(data)

    def archive(self, directory: str, target: Path, *, limit_bytes: int) -> None:
        del limit_bytes
        tools.run(["tar", "-C", self.directory / Path(directory).name, "-cf", target, "."], doing="packing")

    def fill(self, number: int, disk: Path, extent: Extent, options: Sequence[str]) -> JobResult:
        """As the sandbox does, which is a guest, too."""
        return self.run(["mke2fs", str(number), str(disk), str(extent), *options], {}, "/")

    def discard(self) -> None:
        """As the sandbox."""
