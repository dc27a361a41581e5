# SPDX-License-Identifier: Apache-2.0
"""One build, from the plan to the files the user asked for."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from virt_dib import environment as contract
from virt_dib import formats, kvm, layout, staging, supermin
from virt_dib.appliance import Appliance, Disk, Settings, open_appliance
from virt_dib.environment import Facts
from virt_dib.errors import ApplianceError, Problem, ScriptError, ToolError
from virt_dib.interrupts import shielded
from virt_dib.jobs import STATUS, Event
from virt_dib.monitor import BuildMonitor
from virt_dib.plan import BuildPlan, make_plan
from virt_dib.report import Artifact, BuildReport, PhaseResult, ScriptResult
from virt_dib.spec import DISK_PHASES, TREE_PHASES, BuildSpec, Phase, Where

_GUEST_SCRIPTS = f"{contract.GUEST}/guest"
_RUNNER_PATH = {"PATH": contract.SYSTEM_PATH, "LC_ALL": "C"}
_OUT_LIMIT_BYTES = 16 * 1024**3
_STEPS = ("starting the appliance", "making the image disk", "copying the tree", "cleaning up")
_BLOCK_DEVICE_DIR = f"{contract.BUILD_DIR}/block-device"
_NO_TREE_STATUS = 3
_LAST_LINES = 10
_HOST_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)
_MOST_RESULTS = 10_000
"""Scripts of a phase in the report; a guest may forge any number."""
_ANSWER_LIMIT = 4096


def build_image(
    spec: BuildSpec,
    *,
    problems: Sequence[Problem] = (),
    acceleration_wanted: str = "auto",
    trace: bool = False,
    open_monitor: Callable[[Path, int], contextlib.AbstractContextManager[BuildMonitor]],
) -> BuildReport:
    """Build what *spec* asks for.

    *open_monitor* gets the path of the log and the number of phases and steps.

    Raises:
        VirtDibError: what went wrong; files of an earlier build are as they were.
    """
    begun = time.monotonic()
    with _workspace() as workspace, _host_errors(workspace, spec.output_dir):
        plan = make_plan(spec, workspace, problems)
        log_path = spec.output_dir / f"{spec.name}.log"
        phases = [phase for phase in Phase if (plan.staging.hooks_dir / phase.directory).is_dir()]
        steps = len(phases) + len(_STEPS) + len(plan.formats) + (1 if spec.extra_packages else 0)
        with open_monitor(log_path, steps) as monitor:
            build = _Build(plan, monitor, workspace, acceleration_wanted, trace=trace)
            artifacts = build.run()
    with contextlib.suppress(OSError):  # somebody tidied it away; the build is good all the same
        log = Artifact(path=log_path, format="log", allocated_bytes=log_path.stat().st_blocks * 512)
        artifacts = (*artifacts, log)
    return BuildReport(
        name=spec.name, phases=tuple(build.results), artifacts=artifacts, seconds=time.monotonic() - begun
    )


@contextlib.contextmanager
def _workspace() -> Iterator[Path]:
    """A private directory for the disks of one build, in TMPDIR or ``/var/tmp``."""
    parent = os.environ.get("TMPDIR") or "/var/tmp"  # noqa: S108 - the directory made there is private
    with contextlib.ExitStack() as stack, shielded():
        try:
            directory = Path(tempfile.mkdtemp(prefix="virt-dib-", dir=parent))
        except OSError as error:
            raise ToolError(
                f"making a directory for the build in '{parent}': {error.strerror}",
                hint="set TMPDIR to a directory that you can write and that has space",
            ) from error
        stack.callback(_remove, directory)
        kept = stack.pop_all()
    with kept:
        yield directory


def _remove(directory: Path) -> None:
    with shielded():
        staging.remove_tree(directory)


@contextlib.contextmanager
def _host_errors(workspace: Path, output_dir: Path) -> Iterator[None]:
    """Tell what the host's file systems refuse, wherever in a build that is, as an error of the user's."""
    try:
        yield
    except OSError as error:
        if error.errno not in _HOST_ERRORS:
            raise
        raise ToolError(
            f"writing the files of the build in '{workspace.parent}' and '{output_dir}': {error.strerror}"
            + (f": '{error.filename}'" if error.filename else ""),
            hint="make room there; TMPDIR names another directory for the disks of a build",
        ) from error


class _Build:
    """One build under way."""

    def __init__(
        self, plan: BuildPlan, monitor: BuildMonitor, workspace: Path, acceleration_wanted: str, *, trace: bool
    ) -> None:
        self._plan = plan
        self._monitor = monitor
        self._workspace = workspace
        self._wanted = acceleration_wanted
        self._trace = trace
        self._facts: Facts = plan.facts
        self.results: list[PhaseResult] = []

    def run(self) -> tuple[Artifact, ...]:
        """The whole build, in order."""
        plan = self._plan
        build_disk = Disk(path=self._workspace / "build.img", label="build")
        image_disk = Disk(path=self._workspace / "image.img", label="image")
        if plan.layout.discarded:
            names = ", ".join(plan.layout.discarded)
            self._monitor.warning(f"only {layout.OUTPUT_IMAGE} becomes an output; built and thrown away: {names}")
        with self._outputs() as outputs:
            plan.staging.make_disk(build_disk.path)
            _make_image_disk(image_disk.path, plan.layout.disk_bytes)
            with self._appliance([build_disk, image_disk]) as appliance:
                self._load_block_device(appliance)
                for phase in TREE_PHASES:
                    self._run_phase(appliance, phase)
                    self._after(appliance, phase)
                self._make_image(appliance)
                for phase in DISK_PHASES[1:]:
                    self._run_phase(appliance, phase)
                self._finish_image(appliance)
                for name in outputs.add(appliance):
                    self._monitor.warning(f"neither file nor directory, not taken over from the guest: {name}")
            # Of the disk, as long as any image may become, the output is the beginning.
            os.truncate(image_disk.path, plan.layout.images[0].size_bytes or (self._facts.image_size_kib or 0) * 1024)
            for output in plan.formats:
                with self._step(f"writing {output.name}"):
                    outputs.convert(output, image_disk.path)
            return outputs.publish()

    # ---- the appliance ----

    @contextlib.contextmanager
    def _appliance(self, disks: Sequence[Disk]) -> Iterator[Appliance]:
        verdict = kvm.choose(wanted=self._wanted, kernel=None, cache_dir=supermin.cache_dir())
        accelerate = verdict.acceleration is kvm.Acceleration.KVM
        if not accelerate:
            self._monitor.message(f"emulating the appliance, about 15 times slower than with KVM: {verdict.reason}")
        settings = Settings(
            disks=disks,
            cache_dir=supermin.cache_dir(),
            memory_mib=self._plan.memory_mib,
            cpus=self._plan.cpus,
            network=self._plan.spec.network,
            accelerate=accelerate,
            insist=self._wanted == "on",
            trace=self._trace,
            verbose=self._trace,
            on_message=self._monitor.message,
        )
        with contextlib.ExitStack() as stack:
            with self._step(_STEPS[0]):
                appliance = stack.enter_context(open_appliance(settings))
            yield appliance
            appliance.stop()

    @contextlib.contextmanager
    def _step(self, title: str) -> Iterator[None]:
        """Something the runner does itself, shown and timed like a phase."""
        self._monitor.phase_started(title, ())
        begun = time.monotonic()
        yield
        result = PhaseResult(title=title, seconds=time.monotonic() - begun)
        self.results.append(result)
        self._monitor.phase_finished(result)

    def _guest(self, appliance: Appliance, doing: str, script: str, *arguments: str) -> None:
        """Run one of our own guest scripts."""
        command = [f"{_GUEST_SCRIPTS}/{script}", *arguments]
        appliance.run(command, _RUNNER_PATH, contract.GUEST).check(doing)

    # ---- phases ----

    def _run_phase(self, appliance: Appliance, phase: Phase) -> None:
        if not appliance.is_directory(f"{contract.HOOKS}/{phase.directory}"):
            return
        scripts = _PhaseScripts(phase, self._plan.hooks.owners, self._monitor)
        variables = contract.for_phase(self._facts, phase)
        if phase.where is Where.CHROOT:
            command = [f"{_GUEST_SCRIPTS}/in-chroot.sh", contract.TREE, contract.HOOKS, phase.directory]
            cwd = "/"
        else:
            command = [f"{_GUEST_SCRIPTS}/run-phase.sh", f"{contract.HOOKS}/{phase.directory}"]
            cwd = contract.OUT
        begun = time.monotonic()
        result = appliance.run(
            command,
            variables,
            cwd,
            functions=contract.functions(self._facts, phase),
            on_output=self._monitor.output,
            on_event=scripts.event,
        )
        scripts.end(result.exit_status)
        seconds = time.monotonic() - begun
        phase_result = PhaseResult(title=phase.directory, seconds=seconds, scripts=tuple(scripts.results))
        self.results.append(phase_result)
        self._monitor.phase_finished(phase_result)

    def _after(self, appliance: Appliance, phase: Phase) -> None:
        """What the runner itself does when a phase of the tree stage is over."""
        if phase is Phase.ROOT:
            arguments = ["after_root", contract.TREE, contract.HOOKS, self._plan.spec.install_type]
            result = appliance.run([f"{_GUEST_SCRIPTS}/tree.sh", *arguments], _RUNNER_PATH, contract.GUEST)
            if result.exit_status == _NO_TREE_STATUS:
                raise ScriptError(
                    "root.d ended without a root file system in place",
                    hint="the operating-system element must fill $TARGET_ROOT in its root.d",
                )
            result.check("preparing the tree after root.d")
        elif phase is Phase.INSTALL and self._plan.spec.extra_packages:
            self._install_packages(appliance)
        elif phase is Phase.POST_ROOT:
            self._guest(appliance, "setting the tree aside", "tree.sh", "set_aside", contract.TREE, contract.BUILT)

    def _install_packages(self, appliance: Appliance) -> None:
        packages = self._plan.spec.extra_packages
        with self._step("extra packages"):
            result = appliance.run(
                [f"{_GUEST_SCRIPTS}/chroot-command.sh", contract.TREE, "install-packages", *packages],
                contract.for_phase(self._facts, Phase.INSTALL),
                "/",
                on_output=self._monitor.output,
            )
            if result.exit_status != 0:
                raise ScriptError(
                    f"installing the extra packages {', '.join(packages)}: install-packages failed with exit status "
                    f"{result.exit_status}",
                    hint=f"an element must provide install-packages, and the packages must exist; "
                    f"{_where(self._monitor)}",
                    details=self._monitor.tail(_LAST_LINES),
                )

    # ---- the image disk ----

    def _make_image(self, appliance: Appliance) -> None:
        """From the finished tree to mounted file systems with the tree in them."""
        plan = self._plan
        tree_kib = _tree_size_kib(appliance.read(f"{contract.BUILD_DIR}/tree-size-kib"), plan.layout.disk_bytes)
        fstype = plan.layout.block_devices.root_fstype
        size_kib = layout.image_size_kib(plan.spec, plan.elements, fstype, tree_kib)
        self._facts = dataclasses.replace(self._facts, image_size_kib=size_kib)
        self._run_phase(appliance, Phase.BLOCK_DEVICE)
        with self._step(_STEPS[1]):
            for image in plan.layout.images:
                arguments = [f"{image.directory}/{image.name}.raw", str(image.offset_bytes)]
                size_bytes = image.size_bytes or size_kib * 1024
                self._guest(appliance, "laying out the image disk", "image-disk.sh", *arguments, str(size_bytes))
            options = layout.mkfs_options(plan.spec, fstype)
            params = layout.params_text(plan.layout, size_kib=size_kib, options=options)
            appliance.write(contract.PARAMS, params.encode())
            wanted = ("getval:image-block-device", "getval:image-block-devices")
            device, devices = self._block_device(appliance, _STEPS[1], "init", "create", *wanted, "writefstab")
            self._facts = dataclasses.replace(self._facts, image_block_device=device, image_block_devices=devices)
        with self._step(_STEPS[2]):
            command = [f"{_GUEST_SCRIPTS}/tree.sh", "copy_tree", contract.BUILT, contract.TREE]
            result = appliance.run(command, _RUNNER_PATH, contract.GUEST)
            if result.exit_status != 0 and "No space left on device" in result.tail:
                raise ApplianceError(
                    f"copying the tree of {tree_kib // 1024} MiB into the image: no space left in the image of "
                    f"{size_kib // 1024} MiB",
                    hint="give a larger --size, or --size auto",
                )
            result.check("copying the tree into the image")

    def _finish_image(self, appliance: Appliance) -> None:
        with self._step(_STEPS[3]):
            points = self._plan.layout.block_devices.mount_points.split("|")
            self._guest(appliance, "cleaning the image", "tree.sh", "clean", contract.TREE, *points)
            self._block_device(appliance, "unmounting the image", "umount", "cleanup")

    def _block_device(self, appliance: Appliance, doing: str, *commands: str) -> list[str]:
        """Run commands of dib-block-device in the appliance; return what each of its getvals printed."""
        answers = f"{contract.BUILD_DIR}/answers.json"
        output = _Lines(self._monitor.output)
        result = appliance.run(
            [f"{_GUEST_SCRIPTS}/block-device.sh", _BLOCK_DEVICE_DIR, answers, *commands],
            self._block_device_variables(),
            contract.OUT,
            on_output=output.feed,
        )
        if result.exit_status != 0:
            advice = "is --size large enough for all partitions? " if "create" in commands else ""
            raise ApplianceError(f"{doing}: {output.last}", hint=advice + _where(self._monitor))
        return _answers(appliance.read(answers), [command for command in commands if command.startswith("getval:")])

    def _load_block_device(self, appliance: Appliance) -> None:
        """Have DIB imported in the background, while the tree is being made."""
        command = ["/usr/bin/python3", "-S", f"{_GUEST_SCRIPTS}/block-device.py", "--serve", _BLOCK_DEVICE_DIR]
        appliance.run(command, self._block_device_variables(), contract.OUT).check("starting dib-block-device")

    def _block_device_variables(self) -> dict[str, str]:
        return contract.for_phase(self._facts, Phase.BLOCK_DEVICE) | {"PYTHONPATH": contract.SITE}

    # ---- outputs ----

    @contextlib.contextmanager
    def _outputs(self) -> Iterator[_Outputs]:
        outputs = _Outputs(self._plan, self._workspace)
        try:
            yield outputs
        except BaseException:
            outputs.discard()
            raise


class _PhaseScripts:
    """Follows the events of one phase, and turns its end into results or an error."""

    def __init__(self, phase: Phase, owners: Mapping[str, str], monitor: BuildMonitor) -> None:
        self._phase = phase
        self._owners = owners
        self._monitor = monitor
        self._listed = False
        self._running: tuple[str, float] | None = None
        self.results: list[ScriptResult] = []

    def event(self, event: Event) -> None:
        """Take one event of ``guest/run-phase.sh``."""
        words = event.words
        if event.name == "list":
            self._listed = True
            self._monitor.phase_started(self._phase.directory, words)
        elif event.name == "start" and len(words) == 2:  # noqa: PLR2004 - NAME SECONDS
            self._running = (words[0], _seconds(words[1]))
            self._monitor.script_started(words[0])
        elif event.name == "end" and len(words) == 3 and self._running:  # noqa: PLR2004 - NAME STATUS SECONDS
            name, begun = self._running
            self._running = None
            status = int(words[1]) if STATUS.fullmatch(words[1]) else 1
            result = ScriptResult(
                phase=self._phase,
                name=name,
                element=self._owners.get(f"{self._phase.directory}/{name}"),
                exit_status=status,
                seconds=max(0.0, _seconds(words[2]) - begun),
            )
            if len(self.results) < _MOST_RESULTS or status != 0:
                self.results = [*self.results[:_MOST_RESULTS], result]
            self._monitor.script_finished(result)

    def end(self, exit_status: int) -> None:
        """Take the status of the whole phase.

        Raises:
            ScriptError: naming the script that failed, or environment.d.
        """
        if not self._listed:
            self._monitor.phase_started(self._phase.directory, ())
        if exit_status == 0:
            return
        failed = self.results[-1] if self.results and self.results[-1].exit_status != 0 else None
        if failed is None:
            raise ScriptError(
                f"{self._phase.directory}: its scripts could not be run, exit status {exit_status}",
                hint=f"a file in environment.d may be at fault; {_where(self._monitor)}",
                details=self._monitor.tail(_LAST_LINES),
            )
        element = f" of element '{failed.element}'" if failed.element else ""
        how = f"exit status {failed.exit_status}"
        if failed.signal_name:
            how += f" ({failed.signal_name})"
        raise ScriptError(
            f"{self._phase.directory}/{failed.name}{element} failed with {how} after {failed.seconds:.1f} s",
            hint=_where(self._monitor),
            details=self._monitor.tail(_LAST_LINES),
        )


def _where(monitor: BuildMonitor) -> str:
    return f"all of its output is in '{monitor.log_path}' from line {monitor.line_number}"


def _tree_size_kib(text: bytes, most_bytes: int) -> int:
    """What the guest measured, if it can be."""
    if re.fullmatch(rb"[0-9]{1,12}\n?", text) is None:
        raise ApplianceError("measuring the tree: the guest gave no number")
    size_kib = int(text)
    if not 0 < size_kib * 1024 < max(most_bytes, staging.BUILD_DISK_BYTES):
        raise ApplianceError(f"measuring the tree: {size_kib} KiB cannot be")
    return size_kib


def _answers(text: bytes, wanted: Sequence[str]) -> list[str]:
    """The guest's answers to *wanted*, if they are what answers look like."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ApplianceError("reading the answers of dib-block-device: they are not JSON") from error
    values = [found.get(key) for key in wanted] if isinstance(found, dict) else [None]
    if not all(isinstance(value, str) and len(value) < _ANSWER_LIMIT and value.isprintable() for value in values):
        raise ApplianceError("reading the answers of dib-block-device: they are not what was asked for")
    return [str(value) for value in values]


class _Lines:
    """Passes output on and remembers its last line that says something."""

    def __init__(self, sink: Callable[[bytes], None]) -> None:
        self._sink = sink
        self._end = b""

    def feed(self, data: bytes) -> None:
        self._sink(data)
        self._end = (self._end + data)[-4096:]

    @property
    def last(self) -> str:
        lines = [line.strip() for line in self._end.decode(errors="replace").splitlines() if line.strip()]
        return "".join(c if c.isprintable() else "?" for c in lines[-1]) if lines else "no reason given"


class _Outputs:
    """The files of one build, beside their final names until all are complete."""

    def __init__(self, plan: BuildPlan, workspace: Path) -> None:
        self._plan = plan
        self._workspace = workspace
        self._directory = plan.spec.output_dir
        self._mark = workspace.name.rpartition("-")[2]
        self._partial: list[tuple[Path, Path, formats.DiskFormat | None]] = []

    def add(self, appliance: Appliance) -> Sequence[str]:
        """Take over what the elements left in their working directory, the future ``NAME.d``.

        Returns the names that were left out: links, devices and the like.
        """
        archive = self._workspace / "out.tar"
        appliance.archive(contract.OUT, archive, limit_bytes=_OUT_LIMIT_BYTES)
        partial = self._new(f"{self._plan.spec.name}.d", None)
        partial.mkdir()
        copied = staging.copy_out(archive, partial, limit_bytes=_OUT_LIMIT_BYTES)
        archive.unlink()
        if copied.files == 0:
            staging.remove_tree(partial)
            self._partial.pop()
        return copied.left_out

    def convert(self, output: formats.DiskFormat, disk: Path) -> None:
        """Write one format."""
        spec = self._plan.spec
        name = f"{spec.name}.{output.suffix}"
        partial = self._new(name, output)
        formats.write(output, disk, partial, name=name, compress=spec.compress, options=spec.qemu_img_options)

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
        if not self._plan.spec.delete_on_failure:
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


def _make_image_disk(path: Path, size_bytes: int) -> None:
    try:
        with path.open("xb") as stream:
            stream.truncate(size_bytes)
    except OSError as error:
        raise ToolError(
            f"making an image disk of {size_bytes // 1024**2} MiB in '{path.parent}': {error.strerror}",
            hint="set TMPDIR to a directory whose file system allows sparse files of that length",
        ) from error


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
