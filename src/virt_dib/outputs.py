# SPDX-License-Identifier: Apache-2.0
"""The files of one build on their way to their names: beside them until all are complete."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import time
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

from virt_dib import archives, formats, staging
from virt_dib import environment as contract
from virt_dib.appliance import Appliance
from virt_dib.archives import Imported
from virt_dib.files import copy_content
from virt_dib.interrupts import shielded
from virt_dib.report import Artifact
from virt_dib.spec import CHECKSUMS, BuildSpec, DropIn
from virt_dib.staging import CopiedOut
from virt_dib.workspace import note_elsewhere

_DIRECTORY = "directory"
_FILE = "file"
_OUT_LIMIT_BYTES = 16 * 1024**3
_MANIFESTS = "DIB_MANIFEST_SAVE_DIR"
"""The variable that names a directory for files that DIB's element 'manifests' leaves."""
_MOST_WARNINGS = 20


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
        self._partial: list[tuple[Path, Path, formats.Format | str]] = []
        """What is written, its final name, and the format or the word for it in the report."""
        self._imported: Imported | None = None
        self._scratch: list[Path] = []
        """Directories with files that go elsewhere."""
        self.left: tuple[str, ...] = ()
        """The names in what will be ``NAME.d``."""
        self._warnings: list[str] = []
        self.renamed: list[tuple[Path, Path]] = []
        """Files of earlier builds, and the names they have now."""

    def add(self, appliance: Appliance) -> Sequence[str]:
        """Take over what the elements left in their working directory, the future ``NAME.d``; see ``DropIn``, too.

        Returns what there is to say about files that are not taken over.
        """
        if self._spec.drop_in is not None:
            left_out = self._add_files(appliance, self._spec.drop_in)
        else:
            left_out = self._add_directory(appliance)
        for name in left_out:
            self.warning(f"neither file nor directory, not taken over from the guest: {name}")
        told, more = self._warnings[:_MOST_WARNINGS], len(self._warnings) - _MOST_WARNINGS
        self._warnings = []
        if more > 0:
            self.warning(f"{more} more files of the guest are not taken over")
        return [*told, *self._warnings]

    def warning(self, text: str) -> None:
        """Have *text* told."""
        self._warnings.append(text)

    def _add_directory(self, appliance: Appliance) -> list[str]:
        """All as one directory; returns the names of links, devices and the like."""
        partial = self._new(f"{self._spec.name}.d", _DIRECTORY)
        copied = self._copy_out(appliance, contract.OUT, partial)
        if copied.files > 0:
            self.left = tuple(sorted(entry.name for entry in partial.iterdir()))
        else:
            staging.remove_tree(partial)
            self._partial.pop()
        return list(copied.left_out)

    def _copy_out(self, appliance: Appliance, inside: str, target: Path) -> CopiedOut:
        archive = self._workspace / "out.tar"
        appliance.archive(inside, archive, limit_bytes=_OUT_LIMIT_BYTES)
        copied = staging.copy_out(archive, target, limit_bytes=_OUT_LIMIT_BYTES)
        archive.unlink()
        return copied

    def _add_files(self, appliance: Appliance, drop_in: DropIn) -> list[str]:
        """Every file on its own, to where it would be if the elements had run there; returns as the other one."""
        name = None if drop_in.leads_away else os.path.normpath(drop_in.image_name)
        base = drop_in.working_dir
        if not os.access(base, os.W_OK | os.X_OK):
            base, name = self._directory, None
        own = [*_named_after(name), *_directory_given(self._spec.variables.get(_MANIFESTS))]
        left_out = self._add_files_below(appliance, contract.OUT, base, own)
        if drop_in.leads_away:
            own = _named_after(self._spec.name)
            left_out += self._add_files_below(appliance, contract.NAMED, self._directory, own)
        return left_out

    def _add_files_below(self, appliance: Appliance, inside: str, base: Path, own: Sequence[str]) -> list[str]:
        """What is below *inside* in the guest goes below *base*; names that begin with one of *own* may replace."""
        scratch = base / f".{self._spec.name}.{_mark()}.partial"
        self._scratch.append(scratch)
        self._note(scratch)
        scratch.mkdir()
        copied = self._copy_out(appliance, inside, scratch)
        for path in sorted(path for path in scratch.rglob("*") if not path.is_dir()):
            name = str(path.relative_to(scratch))
            reason = _refusal(base, name, own)
            if reason is not None:
                self.warning(f"not taken over from the guest: '{base / name}': {reason}")
            else:
                self._partial.append((path, base / name, _FILE))
        return list(copied.left_out)

    def convert(self, outputs: Sequence[formats.Format], sources: formats.Sources) -> None:
        """Write all formats; the image for an engine goes there, when the others are complete, without its name."""
        names = {formats.file_name(self._spec, output): output for output in outputs if output.is_file}
        targets = {name: (self._new(name, output), output) for name, output in names.items()}
        formats.write(self._spec, sources, targets, self._workspace)
        if formats.wants_engine(outputs):
            self._imported = formats.load(self._spec, sources)

    def sum(self) -> None:
        """Write the checksums of all output files, in the form of md5sum(1)."""
        files = {final.name: partial for partial, final, kind in self._partial if isinstance(kind, formats.Format)}
        for name, sums in archives.sums_of(files, self._spec.checksums).items():
            for kind, digest in sums.items():
                # DIB gives md5sum the path that it was given.
                shown = self._spec.told_name + name.removeprefix(self._spec.name)
                self._new(f"{name}.{kind}", "checksum").write_text(_checksum_line(digest, shown))

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
                    aside = final.with_name(f".{final.name}.{_mark()}.old")
                    note_elsewhere(self._workspace, aside, name=final)
                    final.rename(aside)
                    replaced.append(aside)
                elif kind == _FILE:
                    final.parent.mkdir(parents=True, exist_ok=True)
                elif isinstance(kind, formats.Format) and self._spec.drop_in is not None:
                    self._keep_old(final, self._spec.drop_in)
                partial.replace(final)
            self._partial.clear()
            for aside in [*replaced, *self._scratch]:
                staging.remove_tree(aside)
        return artifacts

    def _keep_old(self, final: Path, drop_in: DropIn) -> None:
        """Give an earlier file and its checksums the names that DIB gives them (lib/common-functions, finish_image)."""
        if not drop_in.keep_old or not final.is_file():
            return
        stem, _, suffix = final.name.rpartition(".")
        old = final.with_name(f"{stem}-{time.strftime('%Y.%m.%d-%H.%M.%S')}.{suffix}")
        for ending in ("", *(f".{kind}" for kind in CHECKSUMS)):
            with contextlib.suppress(FileNotFoundError):
                final.with_name(final.name + ending).rename(old.with_name(old.name + ending))
        self.renamed.append((final, old))

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
            for scratch in self._scratch:
                staging.remove_tree(scratch)

    def keep(self, disk: Path, kind: str) -> Path:
        """Put the *disk* of a build that has failed beside the outputs; returns its name there.

        It is for the user alone: the variables of the scripts are in it.

        Raises:
            OSError: there is no room for it.
        """
        kept = self._directory / f".{self._spec.name}.{kind}.{_mark()}.partial"
        disk.chmod(0o600)
        try:
            disk.rename(kept)
        except OSError:
            # Another file system, most likely.
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with disk.open("rb") as reader, open(os.open(kept, flags, 0o600), "wb") as writer:
                copy_content(reader.fileno(), writer.fileno())
        return kept

    def _new(self, name: str, kind: formats.Format | str) -> Path:
        """A file or directory beside its name, with the rights that the user's umask leaves.

        A file is made here, for programs open whatever has its name, and not all know of umasks that leave more to a
        group. In a directory that others may write to, that could be a link of theirs.
        """
        partial = self._directory / f".{name}.{_mark()}.partial"
        self._note(partial)
        # Before it is there: a signal may come in between.
        self._partial.append((partial, self._directory / name, kind))
        try:
            if kind == _DIRECTORY:
                partial.mkdir()
            else:
                os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666))
        except OSError:
            # What is there then is somebody else's.
            self._partial.pop()
            raise
        return partial

    def _note(self, partial: Path) -> None:
        if self._spec.delete_on_failure:
            note_elsewhere(self._workspace, partial)

    @property
    def engine(self) -> str | None:
        """The engine that has the image for containers."""
        return None if self._imported is None else self._imported.engine.name


def _mark() -> str:
    """What nobody can know before."""
    return secrets.token_hex(4)


def _named_after(image: str | None) -> list[str]:
    """How the names of files begin that are named after the image."""
    return [] if image is None else [f"{image}.", f"{image}-"]


def _directory_given(value: str | None) -> list[str]:
    """The same of files in the directory *value*, which the user has given to the elements, if it can be meant."""
    name = os.path.normpath(value or ".")
    return [] if name.startswith((".", "/")) else [f"{name}/"]


def _refusal(base: Path, name: str, own: Sequence[str]) -> str | None:
    """Why the file *name*, which the guest chose, is not to be below *base*, the user's directory; None: it may.

    Only what begins with one of *own* replaces something, or goes into a directory that is there: that may be any, and
    what lies in it may have a meaning to other programs. Nor are there to be hidden files which have one.
    """
    mine = name.startswith(tuple(own))
    parts = Path(name).parts
    if not mine and any(part.startswith(".") for part in parts):
        return "its name begins with a dot" if len(parts) == 1 else "a name on its path begins with a dot"
    *parents, _ = accumulate(parts, os.path.join)
    for parent in parents:
        kind = _kind(base / parent)
        if kind not in (None, stat.S_IFDIR):
            return f"'{base / parent}' is no directory"
        if kind is not None and not mine:
            return f"the directory '{base / parent}' is there already, and the file is not named after the image"
    kind = _kind(base / name)
    if kind == stat.S_IFDIR:
        return "a directory is in its place"
    return "there is one already, which is not named after the image" if kind is not None and not mine else None


def _kind(path: Path) -> int | None:
    """The file type of st_mode, of a link itself, or None for nothing."""
    try:
        return stat.S_IFMT(path.lstat().st_mode)
    except FileNotFoundError:
        return None


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
