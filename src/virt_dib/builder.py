# SPDX-License-Identifier: Apache-2.0
"""One build, from the plan to the files the user asked for."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from virt_dib import (
    disk_stage,
    drive,
    extra_data,
    formats,
    kvm,
    layout,
    network,
    sandbox,
    shells,
    staging,
    supermin,
    tools,
)
from virt_dib import environment as contract
from virt_dib.appliance import Appliance, open_appliance
from virt_dib.break_points import NO_BREAKS, Breaks, after, before
from virt_dib.disk_stage import DiskStage, Lengths
from virt_dib.errors import (
    ApplianceError,
    PrerequisiteError,
    Problem,
    ScriptError,
    ToolError,
    UsageError,
    VirtDibError,
    reason_of,
)
from virt_dib.events import Listener, ignore
from virt_dib.files import remove_tree, temp_dir_variable
from virt_dib.hooks import Script
from virt_dib.interrupts import Cancellation, Limit, cancellable, limited
from virt_dib.jobs import Runner
from virt_dib.kvm import Acceleration, Verdict
from virt_dib.machine import Disk, Settings
from virt_dib.masking import Mask
from virt_dib.monitor import BuildMonitor
from virt_dib.outputs import Outputs, open_outputs
from virt_dib.phases import LAST_LINES, Phases
from virt_dib.plan import BuildPlan, make_plan
from virt_dib.report import Artifact, BuildReport, PhaseResult
from virt_dib.sandbox import open_sandbox
from virt_dib.spec import BuildSpec, Isolation, Kvm, Phase, check_member
from virt_dib.tree_stage import make_tree
from virt_dib.workspace import note_coming, note_elsewhere, open_workspace

_SHELL_SOCKET = "shell"
_STARTING_APPLIANCE = "starting the appliance"
_STARTING_SANDBOX = "starting the sandbox"
_COPYING_TO_HOST = "copying the tree to the host"
_COPYING_BACK = "copying back what has changed"
_MAKING_BUILD_DISK = "making the build disk"
_SUMMING = "computing checksums"
_HOST_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)
_LITTLE_BYTES = 1 << 20
"""What is free in a file system that has refused to take more, at most."""
_MANIFESTS = "dib-manifests"
"""What DIB's element 'manifests', which operating systems bring with them, leaves in any build."""
_BESIDES_THE_TREE_BYTES = 4 << 30
"""Room for downloads and the like, when the files of a build are kept in memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOptions:
    """How to run a build, which makes no difference to the image."""

    isolation: Isolation = Isolation.VM
    kvm: Kvm = Kvm.AUTO
    trace: bool = False
    """Have libguestfs tell its calls."""
    verbose: bool = False
    """Have libguestfs tell what it does, and the appliance what it says on its console."""
    temporary_dir: Path | None = None
    """For the disks of the build; None: TMPDIR or ``/var/tmp``."""
    timeout_s: float | None = None
    """How long the build may take; None: as long as it takes."""
    script_timeout_s: float | None = None
    """How long one script of an element may take; likewise."""
    breaks: Breaks = NO_BREAKS
    """Where it stops for a shell on the terminal that is standard input and output (docs/breaking-in.md)."""


def build_image(
    spec: BuildSpec,
    *,
    problems: Sequence[Problem] = (),
    options: RunOptions = RunOptions(),
    listener: Listener = ignore,
    cancellation: Cancellation | None = None,
) -> BuildReport:
    """Build what *spec* asks for, and tell *listener* what happens.

    *problems* were found in the request before; they end the build, together with those that are found now.

    Raises:
        VirtDibError: what went wrong; files of an earlier build are as they were.
        Interrupted: *cancellation* was used; likewise.
    """
    monitor = BuildMonitor(listener)
    limit = Limit(options.timeout_s, lambda: _too_long(options.timeout_s, monitor))
    with monitor.following(spec), cancellable(cancellation), limited(limit):
        limit.start()
        report = _build(spec, problems, options, monitor)
    monitor.finished(report)
    return report


def _too_long(timeout_s: float | None, monitor: BuildMonitor) -> VirtDibError:
    return ToolError(
        f"building the image: it has taken longer than {timeout_s:g} s, and is not at its end: {monitor.now}",
        hint="give it more time with --timeout, or none to end it",
        details=monitor.tail(LAST_LINES),
    )


def _build(spec: BuildSpec, problems: Sequence[Problem], options: RunOptions, monitor: BuildMonitor) -> BuildReport:
    tools.require_working_directory()
    with open_workspace(options.temporary_dir) as workspace, _host_errors(workspace, spec.output_dir):
        wrong = shells.problems_of(options.breaks, workspace / _SHELL_SOCKET)
        plan = _plan(spec, workspace, [*problems, *wrong], options)
        lasting = spec.drop_in is None
        log_path = spec.output_dir / f"{spec.name}.log" if lasting else workspace / "build.log"
        on_elsewhere = functools.partial(note_elsewhere, workspace)
        with drive.held(plan.drive), monitor.logging(log_path, lasting=lasting, on_elsewhere=on_elsewhere):
            monitor.planned([element.name for element in plan.elements], _steps(plan))
            phases = Phases(plan.hooks.owners, monitor, options.breaks, options.script_timeout_s)
            build = _Build(plan, phases, workspace, options)
            artifacts = build.run()
    with contextlib.suppress(OSError):  # it was not to last, or somebody tidied it away; the build is good all the same
        log = Artifact(path=log_path, format="log", allocated_bytes=log_path.stat().st_blocks * 512)
        artifacts = (*artifacts, log)
    return BuildReport(name=spec.name, phases=build.results, artifacts=artifacts, seconds=monitor.elapsed_s)


def _steps(plan: BuildPlan) -> int:
    """How many phases and steps a build has, about."""
    phases = [phase for phase in Phase if (plan.staging.hooks_dir / phase.directory).is_dir()]
    copying = 2 if plan.facts.on_host is not None and Phase.EXTRA_DATA in phases else 0
    more = bool(plan.spec.extra_packages) + bool(plan.image_cache) + copying
    steps = [*disk_stage.STEPS, "writing", *([disk_stage.ARCHIVING] if formats.wants_archive(plan.formats) else [])]
    steps += [_SUMMING] if plan.spec.checksums else []
    return 1 + len(phases) + len(steps) + more


@dataclass(frozen=True, kw_only=True, slots=True)
class ImagePlan:
    """What would be built."""

    elements: Mapping[str, Path]
    """All of them, with the directories they were found in."""
    scripts: tuple[Script, ...]
    """In the order they would run; scripts may add more during the build."""
    formats: tuple[str, ...]
    memory_mib: int
    cpus: int
    warnings: tuple[str, ...] = ()
    """What a build of it would warn of at once, such as a script that is not executable."""


def plan_image(spec: BuildSpec, *, problems: Sequence[Problem] = (), options: RunOptions = RunOptions()) -> ImagePlan:
    """Find out what :func:`build_image` would do, without an appliance or a sandbox and without any file.

    *problems* were found before, as there.

    Raises:
        VirtDibError: all that would keep it from being built, as far as it can be known before.
    """
    tools.require_working_directory()
    with (
        _masked_errors(spec),
        open_workspace(options.temporary_dir) as workspace,
        _host_errors(workspace, spec.output_dir),
    ):
        plan = _plan(spec, workspace, problems, options)
        return ImagePlan(
            elements={element.name: element.path for element in plan.elements},
            scripts=tuple(script for phase in Phase for script in plan.hooks.scripts(phase)),
            formats=tuple(output.name for output in plan.formats),
            memory_mib=plan.memory_mib,
            cpus=plan.cpus,
            warnings=tuple(plan.warnings),
        )


def _plan(spec: BuildSpec, workspace: Path, problems: Sequence[Problem], options: RunOptions) -> BuildPlan:
    check_member(options.isolation, Isolation)
    check_member(options.kvm, Kvm)
    if not spec.elements:
        # Nothing to plan with, and the plan would only say so again.
        raise UsageError.of(
            problems or [Problem("no element named", "name at least an operating system, such as debian-minimal")]
        )
    return make_plan(spec, workspace, problems, in_sandbox=options.isolation is Isolation.SANDBOX)


@contextlib.contextmanager
def _masked_errors(spec: BuildSpec) -> Iterator[None]:
    """As the monitor of a build does."""
    try:
        yield
    except VirtDibError as error:
        error.rewrite(Mask({**os.environ, **spec.variables}))
        raise


@contextlib.contextmanager
def _host_errors(workspace: Path, output_dir: Path) -> Iterator[None]:
    """Tell what the host's file systems refuse, wherever in a build that is, as an error of the user's."""
    try:
        yield
    except OSError as error:
        gone = [directory for directory in (output_dir, workspace) if _is_gone(directory)]
        if error.errno == errno.ENOENT and gone:
            raise ToolError(
                f"writing the files of the build in '{gone[0]}': the directory has been removed meanwhile",
                hint="build again, and leave it where it is",
            ) from error
        if error.errno not in _HOST_ERRORS:
            raise
        full, reason = _full_of(workspace.parent, output_dir), reason_of(error)
        raise ToolError(
            f"writing the files of the build in '{full[0]}': {reason}"
            if len(full) == 1
            else f"writing the files of the build in '{full[0]}' and '{full[1]}': {reason}",
            hint=f"make room there; {temp_dir_variable()} names another directory for the disks of a build",
        ) from error


def _full_of(*directories: Path) -> list[Path]:
    """Those whose file systems have no room now; all where none has not, as with a quota."""
    states = {directory: os.statvfs(directory) for directory in dict.fromkeys(directories)}
    full = [
        directory
        for directory, state in states.items()
        if state.f_bavail * state.f_frsize < _LITTLE_BYTES or (state.f_files and not state.f_favail)
    ]
    return full or list(states)


def _is_gone(directory: Path) -> bool:
    """Whether it has been removed; the current one is still there then, but has no name any more."""
    try:
        return directory.stat().st_nlink == 0
    except FileNotFoundError:
        return True


class _Build:
    """One build under way."""

    def __init__(self, plan: BuildPlan, phases: Phases, workspace: Path, options: RunOptions) -> None:
        self._plan = plan
        self._phases = phases
        self._monitor = phases.monitor
        self._options = options
        self._workspace = workspace
        self._build_disk = Disk(path=workspace / "build.img", label="build")
        self._image_disk = Disk(path=workspace / "image.img", label="image")
        archive_disk = Disk(path=workspace / "tree.tar", label="archive")
        self._archive_disk = archive_disk if formats.wants_archive(plan.formats) else None

    @property
    def results(self) -> Sequence[PhaseResult]:
        """The phases and steps so far."""
        return tuple(self._phases.results)

    def run(self) -> tuple[Artifact, ...]:
        """The whole build, in order."""
        plan = self._plan
        if plan.layout.discarded:
            names = ", ".join(plan.layout.discarded)
            self._monitor.warning(f"only {layout.OUTPUT_IMAGE} becomes an output; built and thrown away: {names}")
        self._tell_mode()
        self._warn_of_phases()
        for warning in plan.warnings:
            self._monitor.warning(warning)
        verdict = kvm.choose(wanted=self._options.kvm, kernel=None, cache_dir=supermin.cache_dir())
        in_sandbox = self._choose_sandbox(verdict)
        if plan.image_cache is not None:
            plan.image_cache.copy_to(plan.staging.inside(contract.cache_of_extra_data(plan.spec)))
        with open_outputs(plan.spec, self._workspace) as outputs:
            _make_sparse(self._image_disk.path, plan.layout.disk_bytes)
            if self._archive_disk is not None:
                _make_sparse(self._archive_disk.path, staging.BUILD_DISK_BYTES)
            stages = self._in_sandbox if in_sandbox else self._in_appliance
            with self._disks_kept(outputs), stages(verdict) as (appliance, lengths):
                outputs.add(appliance)
                self._warn_of_files(outputs)
                self._keep_log(appliance)
                appliance.stop()
            self._check_left(outputs.left)
            if plan.formats:
                # Of the disk, as long as any image may become, the output is the beginning.
                os.truncate(self._image_disk.path, lengths.image_bytes)
                if self._archive_disk is not None and lengths.archive_bytes is not None:
                    os.truncate(self._archive_disk.path, lengths.archive_bytes)
                self._write(outputs)
            artifacts = outputs.publish()
            self._warn_of_files(outputs)
            for _final, old in outputs.renamed:
                self._monitor.message(f"Old image found. Renaming it to {old}")
            return artifacts

    def _warn_of_files(self, outputs: Outputs) -> None:
        for text in outputs.not_taken():
            self._monitor.warning(text)

    def _write(self, outputs: Outputs) -> None:
        """The output files, and their checksums, beside their names."""
        for choice in formats.choices(self._plan.formats, self._plan.spec):
            self._monitor.message(choice)
        archive = None if self._archive_disk is None else self._archive_disk.path
        with self._phases.step(f"writing {', '.join(output.name for output in self._plan.formats)}"):
            outputs.convert(self._plan.formats, formats.Sources(disk=self._image_disk.path, archive=archive))
        if outputs.engine is not None:
            self._monitor.message(f"docker: imported to {outputs.engine}, for {self._plan.spec.docker_target}")
        if self._plan.spec.checksums:
            with self._phases.step(_SUMMING):
                outputs.sum()

    def _warn_of_phases(self) -> None:
        """Of scripts that this release of DIB passes over."""
        dib = self._plan.dib
        directory = self._plan.staging.hooks_dir
        unknown = [
            phase.directory for phase in Phase if not dib.rules.has(phase) and (directory / phase.directory).is_dir()
        ]
        if unknown:
            self._monitor.warning(
                f"not run, since diskimage-builder {dib.version} has no such phase: {', '.join(unknown)}"
            )
        never = {point(phase) for phase in Phase if not dib.rules.has(phase) for point in (before, after)}
        if waiting := sorted(never & self._options.breaks.points):
            self._monitor.warning(
                f"no shell, since diskimage-builder {dib.version} has no such phase: {', '.join(waiting)}"
            )

    # ---- without an image ----

    def _tell_mode(self) -> None:
        spec, no_image = self._plan.spec, self._plan.no_image
        if no_image is not None and spec.drop_in is None:
            self._monitor.message(f"no image is written, whatever --formats says, because of {no_image}")

    def _check_left(self, names: Sequence[str]) -> None:
        """Tell of files that a user will look for in ``NAME.d`` and that the elements have not left.

        Raises:
            ScriptError: a ramdisk was asked for, and there is nothing at all.
        """
        spec, no_image = self._plan.spec, self._plan.no_image
        if spec.drop_in is not None:
            # Its callers know what they have asked for.
            return
        directory = spec.output_dir / f"{spec.name}.d"
        made = set(names) - {_MANIFESTS}
        if no_image is not None and not made:
            text = f"because of {no_image} there is no image, and the elements left no other files"
            hint = "files for the user are those in the working directory when cleanup.d has ended"
            if spec.ramdisk:
                raise ScriptError(text, hint=f"is '{spec.added_element}' the element that makes the ramdisk? {hint}")
            self._monitor.warning(f"{text}: {hint}")
        if not names and directory.is_dir():
            self._monitor.warning(f"'{directory}' is of an earlier build, for this one left no files")

    # ---- where ----

    def _choose_sandbox(self, verdict: Verdict) -> bool:
        """Whether the tree stage runs in the sandbox; says why, and what an emulated appliance costs."""
        wanted = self._options.isolation
        fast = verdict.acceleration is Acceleration.KVM
        with_drive = self._plan.drive is not None
        if wanted is Isolation.AUTO and with_drive:
            self._monitor.message("isolation: vm, the only one that can use a helper drive")
            wanted = Isolation.VM
        if wanted is Isolation.AUTO:
            problems = [] if fast else sandbox.problems(network=self._plan.spec.network)
            if fast:
                self._monitor.message("isolation: vm, since KVM works here")
            elif problems:
                reason = f"{verdict.reason}; nor does the sandbox: {problems[0].message}"
                self._monitor.message(f"isolation: vm, emulated, about 15 times slower: KVM does not work: {reason}")
            else:
                self._monitor.message(f"isolation: sandbox, since KVM does not work here: {verdict.reason}")
            return not fast and not problems
        if wanted is Isolation.VM and not fast:
            self._monitor.message(f"emulating the appliance, about 15 times slower than with KVM: {verdict.reason}")
            instead = ", with --image-cache instead of --drive" if with_drive else ""
            self._monitor.message(
                f"hint: --isolation sandbox runs the elements at native speed{instead}, see docs/isolation.md"
            )
        return wanted is Isolation.SANDBOX

    # ---- the stages ----

    @contextlib.contextmanager
    def _in_appliance(self, verdict: Verdict) -> Iterator[tuple[Appliance, Lengths]]:
        """Both stages in the appliance; gives it, and how much of the disks is used."""
        self._plan.staging.make_disk(self._build_disk.path)
        host = self._host()
        remove_tree(self._plan.staging.directory)
        with contextlib.ExitStack() as stack:
            with self._phases.step(_STARTING_APPLIANCE):
                appliance = self._start_appliance(stack, verdict)
                appliance.prepare()
            if self._plan.drive is not None:
                drive.note_format(self._plan.drive)
            stage = DiskStage(self._plan, self._phases, appliance, self._image_disk.path, self._archive_disk)
            open_host = None if host is None else functools.partial(self._host_with_copy, host, appliance)
            try:
                tree_kib = make_tree(self._plan, self._phases, appliance, open_host=open_host)
                lengths = stage.make_image(tree_kib, None)
            except VirtDibError:
                self._keep_log(appliance)
                self._write_disks(appliance)
                raise
            yield appliance, lengths

    @contextlib.contextmanager
    def _disks_kept(self, outputs: Outputs) -> Iterator[None]:
        """If the user wants that, put the disks of a build that fails beside its log (--no-delete-on-failure)."""
        try:
            yield
        except VirtDibError:
            if not self._plan.spec.delete_on_failure:
                for disk, kind in ((self._build_disk, "build"), (self._image_disk, "raw")):
                    self._keep_disk(disk.path, kind, outputs)
            raise

    def _keep_disk(self, disk: Path, kind: str, outputs: Outputs) -> None:
        try:
            if disk.stat().st_blocks > 0:
                self._monitor.message(f"kept: {outputs.keep(disk, kind)}")
        except OSError as error:
            self._monitor.warning(f"the disk '{kind}' of the build cannot be kept: {reason_of(error)}")

    def _write_disks(self, appliance: Appliance) -> None:
        """Before a build ends that has failed, for those who keep its disks."""
        if not self._plan.spec.delete_on_failure:
            with contextlib.suppress(ApplianceError):  # its own, for the build has one already
                appliance.stop()

    def _keep_log(self, appliance: Appliance) -> None:
        """On the helper drive; never a reason to end a build."""
        if self._monitor.log_path is None:
            return
        try:
            # Somebody may have tidied it away.
            with contextlib.suppress(FileNotFoundError):
                appliance.keep_log(self._monitor.log_path)
        except ApplianceError as error:
            self._monitor.warning(str(error))

    @contextlib.contextmanager
    def _in_sandbox(self, verdict: Verdict) -> Iterator[tuple[Appliance, Lengths]]:
        """The tree stage in the sandbox, while the appliance for the disk stage starts."""
        plan = self._plan
        early = Disk(path=self._workspace / "early.img", label="early")
        plan.staging.make_disk(early.path)
        host = self._host()
        _make_sparse(self._build_disk.path, staging.BUILD_DISK_BYTES)
        with contextlib.ExitStack() as stack:
            with self._phases.step(_STARTING_SANDBOX):
                box = stack.enter_context(open_sandbox(self._sandbox_settings()))
                appliance = self._start_appliance(stack, verdict, early)
            open_host = (
                None
                if host is None
                else functools.partial(
                    extra_data.open_host, host, extra_data.Content(directory=box.directory, ids=box.ids)
                )
            )
            try:
                tree_kib = make_tree(plan, self._phases, box, meanwhile=appliance.check_starting, open_host=open_host)
            except VirtDibError:
                if not plan.spec.delete_on_failure:
                    with contextlib.suppress(ApplianceError):  # as above
                        box.make_build_disk(self._build_disk.path)
                raise
            with self._phases.step(_MAKING_BUILD_DISK):
                box.make_build_disk(self._build_disk.path, plan.layout.parts)
            if not plan.layout.parts:
                box.discard()
            with self._phases.step(_STARTING_APPLIANCE):
                appliance.prepare()
            stage = DiskStage(plan, self._phases, appliance, self._image_disk.path, self._archive_disk)
            try:
                lengths = stage.make_image(tree_kib, box if plan.layout.parts else None)
            except VirtDibError:
                self._write_disks(appliance)
                raise
            yield appliance, lengths

    def _host(self) -> extra_data.Host | None:
        """The host to run extra-data.d on, if that is wanted."""
        if self._plan.facts.on_host is None:
            return None
        return extra_data.prepare(self._plan.facts, self._plan.staging, self._workspace / "on-host")

    @contextlib.contextmanager
    def _host_with_copy(self, host: extra_data.Host, appliance: Appliance) -> Iterator[Runner]:
        """The host, with the tree that is in the appliance."""
        with self._phases.step(_COPYING_TO_HOST):
            copy = extra_data.copy_from(host, appliance)
        with extra_data.open_host(host, copy.content) as runner:
            yield runner
        with self._phases.step(_COPYING_BACK):
            extra_data.copy_back(host, copy, appliance)

    def _sandbox_settings(self) -> sandbox.Settings:
        spec = self._plan.spec
        spare_bytes = sandbox.spare_memory_bytes()
        # A tree that does not fit into the image is of no use; so memory will do where it holds that much and more.
        besides_bytes = _BESIDES_THE_TREE_BYTES + (self._plan.image_cache.size_bytes if self._plan.image_cache else 0)
        wanted_bytes = None if spec.size_bytes is None else spec.size_bytes + besides_bytes
        # What is in memory, only the sandbox sees.
        on_host = self._plan.facts.on_host is not None
        enough = not on_host and spare_bytes is not None and wanted_bytes is not None and wanted_bytes <= spare_bytes
        return sandbox.Settings(
            directory=self._plan.staging.finish(),
            network=spec.network,
            memory_bytes=spare_bytes if enough else None,
        )

    def _start_appliance(self, stack: contextlib.ExitStack, verdict: Verdict, early: Disk | None = None) -> Appliance:
        return stack.enter_context(open_appliance(self._settings(verdict, self._program(stack), early)))

    def _program(self, stack: contextlib.ExitStack) -> Path | None:
        """A qemu without the user's environment, and in a network of its own where the appliance has a network.

        None where that cannot be: libguestfs starts the one that it would take.
        """
        program = tools.find(f"qemu-system-{platform.machine()}")
        own_choice = "LIBGUESTFS_HV" in os.environ or os.environ.get("LIBGUESTFS_BACKEND", "direct") != "direct"
        if program is None or own_choice:
            return None
        try:
            if self._plan.spec.network:
                return stack.enter_context(network.detached_program(program, self._workspace))
        except (ApplianceError, PrerequisiteError, ToolError) as error:
            self._monitor.warning(f"the appliance can reach services on this host's loopback, at 169.254.2.2: {error}")
        try:
            return network.bare_program(program, self._workspace)
        except ToolError:
            return None

    def _settings(self, verdict: Verdict, program: Path | None, early: Disk | None) -> Settings:
        helper = self._plan.drive
        return Settings(
            program=program,
            disks=[self._build_disk, self._image_disk, *([self._archive_disk] if self._archive_disk else [])],
            early_disk=early,
            drive=Disk(path=helper.path, label="drive", format=helper.format) if helper is not None else None,
            cache_dir=supermin.cache_dir(),
            memory_mib=self._plan.memory_mib,
            cpus=self._plan.cpus,
            network=self._plan.spec.network,
            accelerate=verdict.acceleration is Acceleration.KVM,
            insist=self._options.kvm is Kvm.ON,
            trace=self._options.trace,
            verbose=self._options.verbose,
            shell_socket=self._workspace / _SHELL_SOCKET if self._options.breaks.points else None,
            on_elsewhere=functools.partial(note_elsewhere, self._workspace),
            on_coming=functools.partial(note_coming, self._workspace),
            on_message=self._monitor.message,
            on_debug=self._monitor.debug,
        )


def _make_sparse(path: Path, size_bytes: int) -> None:
    try:
        with path.open("xb") as stream:
            stream.truncate(size_bytes)
    except OSError as error:
        raise ToolError(
            f"making a disk of {size_bytes // 1024**2} MiB in '{path.parent}': {error.strerror}",
            hint=f"set {temp_dir_variable()} to a directory whose file system allows sparse files of that length",
        ) from error
