# SPDX-License-Identifier: Apache-2.0
"""The files of one build on their way to their names: beside them until all are complete."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from virt_dib import environment as contract
from virt_dib import formats, staging
from virt_dib.appliance import Appliance
from virt_dib.interrupts import shielded
from virt_dib.report import Artifact
from virt_dib.spec import BuildSpec

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
        self._partial: list[tuple[Path, Path, formats.DiskFormat | None]] = []
        self.left: tuple[str, ...] = ()
        """The names in what will be ``NAME.d``."""

    def add(self, appliance: Appliance) -> Sequence[str]:
        """Take over what the elements left in their working directory, the future ``NAME.d``.

        Returns the names that were left out: links, devices and the like.
        """
        archive = self._workspace / "out.tar"
        appliance.archive(contract.OUT, archive, limit_bytes=_OUT_LIMIT_BYTES)
        partial = self._new(f"{self._spec.name}.d", None)
        partial.mkdir()
        copied = staging.copy_out(archive, partial, limit_bytes=_OUT_LIMIT_BYTES)
        archive.unlink()
        if copied.files > 0:
            self.left = tuple(sorted(entry.name for entry in partial.iterdir()))
        else:
            staging.remove_tree(partial)
            self._partial.pop()
        return copied.left_out

    def convert(self, outputs: Sequence[formats.DiskFormat], disk: Path) -> None:
        """Write all formats."""
        spec = self._spec
        names = {f"{spec.name}.{output.suffix}": output for output in outputs}
        targets = {name: (self._new(name, output), output) for name, output in names.items()}
        formats.write(disk, targets, compress=spec.compress, options=spec.qemu_img_options)

    def publish(self) -> tuple[Artifact, ...]:
        """Give every file its name; what had that name before goes last, when all the new ones are in place."""
        artifacts = tuple(_artifact(partial, final, output) for partial, final, output in self._partial)
        replaced = []
        with shielded():
            for partial, final, output in self._partial:
                if output is None and final.is_dir():
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
        with shielded():
            for partial, _final, _output in self._partial:
                if partial.is_dir():
                    staging.remove_tree(partial)
                else:
                    partial.unlink(missing_ok=True)

    def _new(self, name: str, output: formats.DiskFormat | None) -> Path:
        partial = self._directory / f".{name}.{self._mark}.partial"
        self._partial.append((partial, self._directory / name, output))
        return partial


def _artifact(partial: Path, final: Path, output: formats.DiskFormat | None) -> Artifact:
    if output is None:
        size = sum(entry.stat().st_blocks * 512 for entry in partial.rglob("*") if entry.is_file())
        return Artifact(path=final, format="directory", allocated_bytes=size)
    return Artifact(
        path=final,
        format=output.name,
        allocated_bytes=partial.stat().st_blocks * 512,
        virtual_bytes=formats.virtual_size_bytes(partial, output),
    )
