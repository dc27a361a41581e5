# SPDX-License-Identifier: Apache-2.0
"""The files of one build on their way to their names: beside them until all are complete."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from virt_dib import archives, formats, unpacking
from virt_dib import environment as contract
from virt_dib.appliance import Appliance
from virt_dib.archives import Imported
from virt_dib.errors import Problem, ToolError
from virt_dib.files import copy_content, partial_name, remove_any, remove_tree
from virt_dib.interrupts import shielded, too_late
from virt_dib.report import Artifact
from virt_dib.spec import CHECKSUMS, BuildSpec, DropIn
from virt_dib.unpacking import CopiedOut
from virt_dib.workspace import note_elsewhere

_OUT_LIMIT_BYTES = 16 * 1024**3
_MANIFESTS = "DIB_MANIFEST_SAVE_DIR"
"""The variable that names a directory for files that DIB's element 'manifests' leaves."""
_MOST_WARNINGS = 20
_IN_THE_WAY = (errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ENOTEMPTY)
_MOVE_HINT = "move it away, and build again"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pending:
    """What is to get its name."""

    partial: Path
    final: Path
    word: str
    """What the report calls it."""
    image: formats.Format | None = None
    """Its format, of an image."""
    is_directory: bool = False

    @property
    def replaces(self) -> bool:
        """Whether it may replace what has that name."""
        return True


@dataclass(frozen=True, kw_only=True, slots=True)
class _Chosen(_Pending):
    """A file whose name the guest has chosen, which may be any."""

    word: str = "file"
    base: Path
    """The user's directory that it goes below."""
    own: Sequence[str]
    """How names begin there that are what the user has asked for."""

    @property
    def name(self) -> str:
        """What the guest has chosen."""
        return str(self.final.relative_to(self.base))

    @property
    def replaces(self) -> bool:
        """Whether it may, and may also go into directories of the user's, and have a name that hides it."""
        return self.name.startswith(tuple(self.own))


def longest_name(spec: BuildSpec, names: Sequence[str], images: Sequence[str]) -> str:
    """The longest name that files have meanwhile which are to get *names*, or had those of *images* before."""
    meanwhile = [partial_name(name) for name in (spec.name, *names)]
    if spec.drop_in is not None and spec.drop_in.keep_old:
        meanwhile += [f"{_dated_name(image)}.{kind}" for image in images for kind in CHECKSUMS]
    return max(meanwhile, key=lambda name: len(os.fsencode(name)))


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
        self._pending: list[_Pending] = []
        self._imported: Imported | None = None
        self._scratch: list[Path] = []
        """Directories with files that go elsewhere."""
        self.left: tuple[str, ...] = ()
        """The names in what will be ``NAME.d``."""
        self._warnings: list[str] = []
        self._more_warnings = 0
        self._made: set[Path] = set()
        """Directories for files that the guest has named."""
        self.renamed: list[tuple[Path, Path]] = []
        """Files of earlier builds, and the names they have now."""
        self._aside: list[Path] = []
        """Those that go when all the new ones are in place."""

    def add(self, appliance: Appliance) -> None:
        """Take over what the elements left in their working directory, the future ``NAME.d``; see ``DropIn``, too."""
        if self._spec.drop_in is not None:
            self._add_files(appliance, self._spec.drop_in)
        else:
            self._add_directory(appliance)

    def not_taken(self) -> Sequence[str]:
        """What there is to say about files of the guest that are not taken over, since it was asked last."""
        told, more = self._warnings, self._more_warnings
        self._warnings, self._more_warnings = [], 0
        if more > 0:
            self.warning(f"{more} more files of the guest are not taken over")
        last, self._warnings = self._warnings, []
        return [*told, *last]

    def warning(self, text: str) -> None:
        """Have *text* told by :meth:`not_taken`, unless there are more than people read."""
        if len(self._warnings) < _MOST_WARNINGS:
            self._warnings.append(text)
        else:
            self._more_warnings += 1

    def _add_directory(self, appliance: Appliance) -> None:
        """All as one directory."""
        partial = self._new(f"{self._spec.name}.d", "directory", is_directory=True)
        copied = self._copy_out(appliance, contract.OUT, partial)
        if copied.files > 0:
            self.left = tuple(sorted(entry.name for entry in partial.iterdir()))
        else:
            remove_tree(partial)
            self._pending.pop()

    def _copy_out(self, appliance: Appliance, inside: str, target: Path) -> CopiedOut:
        archive = self._workspace / "out.tar"
        appliance.archive(inside, archive, limit_bytes=_OUT_LIMIT_BYTES)
        copied = unpacking.copy_out(archive, target, limit_bytes=_OUT_LIMIT_BYTES)
        archive.unlink()
        for name in copied.left_out:
            self.warning(f"neither file nor directory, not taken over from the guest: {name}")
        self._more_warnings += copied.more_left_out
        return copied

    def _add_files(self, appliance: Appliance, drop_in: DropIn) -> None:
        """Every file on its own, to where it would be if the elements had run there."""
        name = None if drop_in.leads_away else os.path.normpath(drop_in.image_name)
        base = drop_in.working_dir
        if not os.access(base, os.W_OK | os.X_OK):
            base, name = self._directory, None
        own = [*_named_after(name), *_directory_given(self._spec.variables.get(_MANIFESTS))]
        self._add_files_below(appliance, contract.OUT, base, own)
        if drop_in.leads_away:
            self._add_files_below(appliance, contract.NAMED, self._directory, _named_after(self._spec.name))

    def _add_files_below(self, appliance: Appliance, inside: str, base: Path, own: Sequence[str]) -> None:
        """What is below *inside* in the guest goes below *base*; *own* is as in :class:`_Chosen`."""
        scratch = base / partial_name(self._spec.name)
        self._scratch.append(scratch)
        self._note(scratch)
        scratch.mkdir()
        self._copy_out(appliance, inside, scratch)
        for name in sorted(_files_below(scratch)):
            output = _Chosen(partial=scratch / name, final=base / name, base=base, own=own)
            if self._may_be(output):
                self._pending.append(output)

    def _may_be(self, output: _Chosen) -> bool:
        """Whether a file can get the name that the guest has chosen; it is told if not."""
        reason = _refusal(output, self._made)
        if reason is not None:
            self.warning(f"not taken over from the guest: '{output.final}': {reason}")
        return reason is None

    def convert(self, outputs: Sequence[formats.Format], sources: formats.Sources) -> None:
        """Write all formats; the image for an engine goes there, when the others are complete, without its name."""
        names = {formats.file_name(self._spec, output): output for output in outputs if output.is_file}
        targets = {name: (self._new(name, output.name, image=output), output) for name, output in names.items()}
        formats.write(self._spec, sources, targets, self._workspace)
        if formats.wants_engine(outputs):
            self._imported = formats.load(self._spec, sources)

    def sum(self) -> None:
        """Write the checksums of all output files, in the form of md5sum(1)."""
        files = {output.final.name: output.partial for output in self._pending if output.image is not None}
        for name, sums in archives.sums_of(files, self._spec.checksums).items():
            for kind, digest in sums.items():
                # DIB gives md5sum the path that it was given.
                shown = self._spec.told_name + name.removeprefix(self._spec.name)
                self._new(f"{name}.{kind}", "checksum").write_text(_checksum_line(digest, shown))

    def publish(self) -> tuple[Artifact, ...]:
        """Give every file its name; what had that name before goes last, when all the new ones are in place.

        Files that the guest has named, and that have lost their places meanwhile, are left out (``not_taken``). Once
        all have their names, it is too late to end the build.

        Raises:
            ToolError: something has come meanwhile that cannot be replaced, and then all files are as they were; or
                the engine does not give the image its name.
        """
        artifacts = [_artifact(output) for output in self._pending]
        self._look_again()
        if self._imported is not None and self._spec.docker_target is not None:
            self._imported.tag(self._spec.docker_target)
            # What has its name stays.
            self._imported = None
            # That may have taken its time.
            self._look_again()
        with shielded():
            with contextlib.ExitStack() as undo:
                published = [
                    artifact
                    for output, artifact in zip(self._pending, artifacts, strict=True)
                    if self._give_name(output, undo)
                ]
                undo.pop_all()
            too_late()
            self._pending.clear()
            for aside in [*self._aside, *self._scratch]:
                remove_any(aside)
        return tuple(published)

    def _look_again(self) -> None:
        """Look once more whether something has come that cannot be replaced.

        Raises:
            ToolError: it has.
        """
        found = [_in_the_way(output) for output in self._pending if not isinstance(output, _Chosen)]
        if problems := [problem for problem in found if problem is not None]:
            raise ToolError.of(problems)

    def _give_name(self, output: _Pending, undo: contextlib.ExitStack) -> bool:
        """Give one file or directory its name, unless the guest has chosen that and it may not be there any more.

        Raises:
            ToolError: something is in its place.
        """
        if isinstance(output, _Chosen) and not self._may_be(output):
            return False
        try:
            if isinstance(output, _Chosen):
                self._claim(output, undo)
            elif output.image is not None and self._spec.drop_in is not None:
                self._keep_old(output.final, self._spec.drop_in, undo)
            if output.replaces:
                self._put_aside(output, undo)
            output.partial.replace(output.final)
        except OSError as error:
            if error.errno not in _IN_THE_WAY:
                raise
            raise ToolError(f"cannot write '{output.final}': {error.strerror}", hint=_MOVE_HINT) from error
        _on_undo(undo, output.final.rename, output.partial)
        return True

    def _put_aside(self, output: _Pending, undo: contextlib.ExitStack) -> None:
        """Give what has the name another, from which it can come back. A file has both until it is replaced."""
        # A name no longer than others of the build, whatever the guest has called its file.
        aside = output.final.with_name(f".{self._spec.name}.{secrets.token_hex(4)}.old")
        note_elsewhere(self._workspace, aside, name=output.final)
        try:
            _link_or_rename(output.final, aside)
        except FileNotFoundError:
            return
        _on_undo(undo, _put_back, aside, output.final)
        is_directory = _kind(aside) == stat.S_IFDIR
        if is_directory != output.is_directory:
            number = errno.EISDIR if is_directory else errno.ENOTDIR
            raise OSError(number, os.strerror(number))
        self._aside.append(aside)

    def _claim(self, output: _Chosen, undo: contextlib.ExitStack) -> None:
        """Make the directories for a file, and an empty one in its place if it may replace none: that cannot either."""
        for place in [output.base / parent for parent in reversed(Path(output.name).parents)]:
            if not os.path.lexists(place):
                place.mkdir()
                _on_undo(undo, place.rmdir)
                self._made.add(place)
        if not output.replaces:
            os.close(os.open(output.final, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC))
            _on_undo(undo, output.final.unlink)

    def _keep_old(self, final: Path, drop_in: DropIn, undo: contextlib.ExitStack) -> None:
        """Give an earlier file and its checksums the names that DIB gives them."""
        if not drop_in.keep_old or not final.is_file():
            return
        old = final.with_name(_dated_name(final.name))
        for ending in ("", *(f".{kind}" for kind in CHECKSUMS)):
            before, now = final.with_name(final.name + ending), old.with_name(old.name + ending)
            with contextlib.suppress(FileNotFoundError):
                before.rename(now)
                _on_undo(undo, now.rename, before)
        self.renamed.append((final, old))
        undo.callback(self.renamed.clear)

    def discard(self) -> None:
        """Remove the partial files, and nothing else, unless the user wants to keep them."""
        if not self._spec.delete_on_failure:
            return
        try:
            with shielded():
                for path in [*(output.partial for output in self._pending), *self._scratch]:
                    remove_any(path)
        finally:
            if self._imported is not None:
                with contextlib.suppress(ToolError):  # the build has failed for another reason
                    self._imported.remove()

    def keep(self, disk: Path, kind: str) -> Path:
        """Put the *disk* of a build that has failed beside the outputs; returns its name there.

        It is for the user alone: the variables of the scripts are in it.

        Raises:
            OSError: there is no room for it.
        """
        kept = self._directory / partial_name(f"{self._spec.name}.{kind}")
        disk.chmod(0o600)
        try:
            disk.rename(kept)
        except OSError:
            # Another file system, most likely.
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            try:
                with disk.open("rb") as reader, open(os.open(kept, flags, 0o600), "wb") as writer:
                    copy_content(reader.fileno(), writer.fileno())
            except FileExistsError:
                # Somebody else's.
                raise
            except BaseException:
                kept.unlink(missing_ok=True)
                raise
        return kept

    def _new(self, name: str, word: str, *, image: formats.Format | None = None, is_directory: bool = False) -> Path:
        """A file or directory beside its name, with the rights that the user's umask leaves; see :class:`_Pending`.

        A file is made here, for programs open whatever has its name, and not all know of umasks that leave more to a
        group. In a directory that others may write to, that could be a link of theirs.
        """
        partial = self._directory / partial_name(name)
        self._note(partial)
        # Before it is there: a signal may come in between.
        final = self._directory / name
        self._pending.append(_Pending(partial=partial, final=final, word=word, image=image, is_directory=is_directory))
        try:
            if is_directory:
                partial.mkdir()
            else:
                os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666))
        except OSError:
            # What is there then is somebody else's.
            self._pending.pop()
            raise
        return partial

    def _note(self, partial: Path) -> None:
        if self._spec.delete_on_failure:
            note_elsewhere(self._workspace, partial)

    @property
    def engine(self) -> str | None:
        """The engine that has the image for containers."""
        return None if self._imported is None else self._imported.engine.name


def _on_undo(undo: contextlib.ExitStack, function: Callable[..., object], *arguments: object) -> None:
    """Have *undo* call *function*; what the host does not let undo stays as it is."""

    def run() -> None:
        with contextlib.suppress(OSError):
            function(*arguments)

    undo.callback(run)


def _link_or_rename(path: Path, other: Path) -> None:
    try:
        os.link(path, other, follow_symlinks=False)
    except (FileNotFoundError, FileExistsError):
        raise
    except OSError:
        # A directory, or the file system has no links.
        path.rename(other)


def _put_back(aside: Path, final: Path) -> None:
    aside.replace(final)
    # Two names of one file are not renamed to each other.
    aside.unlink(missing_ok=True)


def _dated_name(name: str) -> str:
    """What DIB calls an earlier file (lib/common-functions, finish_image)."""
    stem, _, suffix = name.rpartition(".")
    return f"{stem}-{time.strftime('%Y.%m.%d-%H.%M.%S')}.{suffix}"


def _named_after(image: str | None) -> list[str]:
    """How the names of files begin that are named after the image."""
    return [] if image is None else [f"{image}.", f"{image}-"]


def _directory_given(value: str | None) -> list[str]:
    """The same of files in the directory *value*, which the user has given to the elements, if it can be meant."""
    name = os.path.normpath(value or ".")
    return [] if name.startswith((".", "/")) else [f"{name}/"]


def _in_the_way(output: _Pending) -> Problem | None:
    """What has come to the place of an output since :func:`virt_dib.plan.make_plan` has looked."""
    kind = _kind(output.final)
    if output.is_directory and kind not in (None, stat.S_IFDIR):
        return Problem(f"cannot write the directory '{output.final}': a file or link is in its place", _MOVE_HINT)
    if not output.is_directory and kind == stat.S_IFDIR:
        return Problem(f"cannot write '{output.final}': a directory is in its place", _MOVE_HINT)
    return None


def _files_below(directory: Path) -> Iterator[str]:
    """The files below, by relative name. There may be more directories in each other than Python goes into."""
    names = [""]
    for name in names:
        with os.scandir(directory / name) as entries:
            for entry in entries:
                inside = os.path.join(name, entry.name)
                if entry.is_dir(follow_symlinks=False):
                    names.append(inside)
                else:
                    yield inside


def _refusal(output: _Chosen, made: Collection[Path]) -> str | None:
    """Why a file cannot have the name that the guest has chosen; None: it can.

    What does not have a name as the user has asked for (``replaces``) may not take another's place, nor go into a
    directory that is there and not *made* for such files: what lies in it may have a meaning to other programs. Nor are
    there to be hidden files which have one.
    """
    base, name, mine = output.base, output.name, output.replaces
    parts = Path(name).parts
    if not mine and any(part.startswith(".") for part in parts):
        return "its name begins with a dot" if len(parts) == 1 else "a name on its path begins with a dot"
    *parents, _ = accumulate(parts, os.path.join)
    for parent in parents:
        kind = _kind(base / parent)
        if kind not in (None, stat.S_IFDIR):
            return f"'{base / parent}' is no directory"
        if kind is not None and not mine and base / parent not in made:
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


def _artifact(output: _Pending) -> Artifact:
    partial, image = output.partial, output.image
    if output.is_directory:
        allocated_bytes = sum((partial / name).stat().st_blocks * 512 for name in _files_below(partial))
    else:
        allocated_bytes = partial.stat().st_blocks * 512
    return Artifact(
        path=output.final,
        format=output.word,
        allocated_bytes=allocated_bytes,
        virtual_bytes=formats.virtual_size_bytes(partial, image) if isinstance(image, formats.DiskFormat) else None,
    )
