# SPDX-License-Identifier: Apache-2.0
"""The files of one build on their way to their names: beside them until all are complete."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from virt_dib import archives, formats, staging
from virt_dib import environment as contract
from virt_dib.appliance import Appliance
from virt_dib.archives import Imported
from virt_dib.interrupts import shielded
from virt_dib.report import Artifact
from virt_dib.spec import BuildSpec

_DIRECTORY = "directory"
_OUT_LIMIT_BYTES = 16 * 1024**3


@contextlib.contextmanager
def open_outputs(spec: BuildSpec, workspace: Path) -> Iterator[Outputs]:
    """The files of one build; when the block ends with an error, those that are not published are removed."""
    outputs = Outputs(spec, workspace)
    try:
        yield outputs
    except BaseException:
        outputs.discard()
        raise


class Outputs:
    """The files of one build, beside their final names until all are complete."""

    def __init__(self, spec: BuildSpec, workspace: Path) -> None:
        self._spec = spec
        self._workspace = workspace
        self._directory = spec.output_dir
        self._mark = workspace.name.rpartition("-")[2]
        self._partial: list[tuple[Path, Path, formats.Format | str]] = []
        """What is written, its final name, and the format or the word for it in the report."""
        self._imported: Imported | None = None
        self.left: tuple[str, ...] = ()
        """The names in what will be ``NAME.d``."""

    def add(self, appliance: Appliance) -> Sequence[str]:
        """Take over what the elements left in their working directory, the future ``NAME.d``.

        Returns the names that were left out: links, devices and the like.
        """
        archive = self._workspace / "out.tar"
        appliance.archive(contract.OUT, archive, limit_bytes=_OUT_LIMIT_BYTES)
        partial = self._new(f"{self._spec.name}.d", _DIRECTORY)
        partial.mkdir()
        copied = staging.copy_out(archive, partial, limit_bytes=_OUT_LIMIT_BYTES)
        archive.unlink()
        if copied.files > 0:
            self.left = tuple(sorted(entry.name for entry in partial.iterdir()))
        else:
            staging.remove_tree(partial)
            self._partial.pop()
        return copied.left_out

    def convert(self, outputs: Sequence[formats.Format], sources: formats.Sources) -> None:
        """Write all formats; the image for an engine goes there, when the others are complete, without its name."""
        names = {f"{self._spec.name}.{output.suffix}": output for output in outputs if output.is_file}
        targets = {name: (self._new(name, output), output) for name, output in names.items()}
        formats.write(self._spec, sources, targets, self._workspace)
        if formats.wants_engine(outputs):
            self._imported = formats.load(self._spec, sources)

    def sum(self) -> None:
        """Write the checksums of all output files, in the form of md5sum(1)."""
        files = {final.name: partial for partial, final, kind in self._partial if isinstance(kind, formats.Format)}
        for name, sums in archives.sums_of(files, self._spec.checksums).items():
            for kind, digest in sums.items():
                self._new(f"{name}.{kind}", "checksum").write_text(_checksum_line(digest, name))

    def publish(self) -> tuple[Artifact, ...]:
        """Give every file its name; what had that name before goes last, when all the new ones are in place.

        Raises:
            ToolError: the engine does not give the image its name.
        """
        artifacts = tuple(_artifact(partial, final, kind) for partial, final, kind in self._partial)
        replaced = []
        if self._imported is not None and self._spec.docker_target is not None:
            self._imported.tag(self._spec.docker_target)
            # What has its name stays.
            self._imported = None
        with shielded():
            for partial, final, kind in self._partial:
                if kind == _DIRECTORY and final.is_dir():
                    aside = final.with_name(f".{final.name}.{self._mark}.old")
                    final.rename(aside)
                    replaced.append(aside)
                partial.replace(final)
            self._partial.clear()
            for aside in replaced:
                staging.remove_tree(aside)
        return artifacts

    def discard(self) -> None:
        """Remove the partial files, and nothing else, unless the user wants to keep them."""
        if not self._spec.delete_on_failure:
            return
        if self._imported is not None:
            self._imported.remove()
        with shielded():
            for partial, _final, _kind in self._partial:
                if partial.is_dir():
                    staging.remove_tree(partial)
                else:
                    partial.unlink(missing_ok=True)

    def _new(self, name: str, kind: formats.Format | str) -> Path:
        partial = self._directory / f".{name}.{self._mark}.partial"
        self._partial.append((partial, self._directory / name, kind))
        return partial

    @property
    def engine(self) -> str | None:
        """The engine that has the image for containers."""
        return None if self._imported is None else self._imported.engine.name


def _checksum_line(digest: str, name: str) -> str:
    """As md5sum writes it, which marks a line where a backslash stands for more than itself."""
    escaped = name.replace("\\", "\\\\")
    return f"{'' if escaped == name else chr(92)}{digest}  {escaped}\n"


def _artifact(partial: Path, final: Path, kind: formats.Format | str) -> Artifact:
    if kind == _DIRECTORY:
        size = sum(entry.stat().st_blocks * 512 for entry in partial.rglob("*") if entry.is_file())
        return Artifact(path=final, format=_DIRECTORY, allocated_bytes=size)
    return Artifact(
        path=final,
        format=kind if isinstance(kind, str) else kind.name,
        allocated_bytes=partial.stat().st_blocks * 512,
        virtual_bytes=formats.virtual_size_bytes(partial, kind) if isinstance(kind, formats.DiskFormat) else None,
    )
