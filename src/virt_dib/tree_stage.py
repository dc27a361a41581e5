# SPDX-License-Identifier: Apache-2.0
"""The tree stage: from root.d to post-root.d, in the appliance or in the sandbox."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from virt_dib import environment as contract
from virt_dib import image_cache, staging
from virt_dib.errors import ApplianceError, ScriptError, reason_of
from virt_dib.image_cache import ImageCache
from virt_dib.jobs import Place, Runner
from virt_dib.phases import GUEST_SCRIPTS, LAST_LINES, Phases, guest_script, named_files
from virt_dib.plain_text import one_line
from virt_dib.plan import BuildPlan
from virt_dib.spec import TREE_PHASES, Phase, Where

CACHE_STEP = "keeping what is cached"
"""What the report shows besides the phases, with an image cache."""

_NO_TREE_STATUS = 3
_MOST_NAMES = 20
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def make_tree(
    plan: BuildPlan,
    phases: Phases,
    place: Place,
    *,
    meanwhile: Callable[[], None] = lambda: None,
    open_host: Callable[[], contextlib.AbstractContextManager[Runner]] | None = None,
) -> int:
    """Run the phases; return the size of the finished tree in KiB, as DIB measures it.

    *meanwhile* is called before each phase; what it raises ends the stage. *open_host* gives the host to run
    extra-data.d on, over the tree that *place* has made so far, and has the tree where it was at its end.

    Raises:
        ScriptError: a script failed, or root.d left no tree.
        ApplianceError: the place itself failed.
    """
    rules = plan.dib.rules
    named_files(place, plan.spec, "make")
    packages_before = Phase.POST_INSTALL if rules.packages_after_install else Phase.INSTALL
    with _cache_kept(plan, phases, place):
        for phase in filter(rules.has, TREE_PHASES):
            meanwhile()
            if phase is packages_before and plan.spec.extra_packages:
                _install_packages(plan, phases, place)
            if phase is not Phase.EXTRA_DATA or open_host is None:
                phases.run(place, phase, plan.facts)
            elif place.is_directory(f"{contract.HOOKS}/{phase.directory}") or phases.shells.wanted_for(phase):
                with open_host() as host:
                    phases.run(host, phase, plan.facts)
            if phase is Phase.ROOT:
                _after_root(plan, place)
    named_files(place, plan.spec, "take")
    guest_script(place, "tree.sh", "set_aside", contract.TREE, contract.BUILT).check("setting the tree aside")
    if _is_set(plan.spec.variables, "DIB_SHOW_IMAGE_USAGE"):
        everything = "1" if _is_set(plan.spec.variables, "DIB_SHOW_IMAGE_USAGE_FULL") else ""
        words = ("show_usage", contract.BUILT, everything)
        guest_script(place, "tree.sh", *words, on_output=phases.monitor.output).check("measuring what is in the tree")
    return _size_kib(place.read(f"{contract.BUILD_DIR}/tree-size-kib"), plan.layout.disk_bytes)


@contextlib.contextmanager
def _cache_kept(plan: BuildPlan, phases: Phases, place: Place) -> Iterator[None]:
    """Take over what the elements cache meanwhile, also when one of them fails."""
    if plan.image_cache is None:
        yield
        return
    directory, record = contract.cache_of_extra_data(plan.spec), f"{contract.GUEST}/image-cache.json"
    _cache_script(place, "mark", directory, record)
    try:
        yield
    except ScriptError:
        _keep_cache(plan.image_cache, phases, place, [directory, record])
        raise
    _keep_cache(plan.image_cache, phases, place, [directory, record])


def _keep_cache(cache: ImageCache, phases: Phases, place: Place, since: Sequence[str]) -> None:
    """Never a reason to end a build."""
    monitor = phases.monitor
    gathered = f"{contract.GUEST}/image-cache"
    with phases.step(CACHE_STEP):
        try:
            _cache_script(place, "gather", *since, gathered)
            place.archive(gathered, cache.archive, limit_bytes=image_cache.LIMIT_BYTES)
            received = cache.receive()
        except ApplianceError as error:
            monitor.warning(f"what the elements cached is not kept: {error}")
            return
        except OSError as error:
            reason = reason_of(error)
            monitor.warning(
                f"what the elements cached is not kept in '{cache.directory}': {reason}; make room there, "
                "or give another --image-cache"
                if error.errno in _NO_ROOM
                else f"what the elements cached is not kept in '{cache.directory}': {reason}"
            )
            return
    if received.entries:
        names = [one_line(name) for name in received.entries[:_MOST_NAMES]]
        more = len(received.entries) - len(names)
        monitor.message(f"cached: {', '.join(names)}" + (f" and {more} more" if more else ""))
    for name in received.refused:
        monitor.warning(f"not cached, since it has changed in the image cache meanwhile: {name}")
    for name in received.left_out[:_MOST_NAMES]:
        monitor.warning(
            f"not cached, since it is no file, no directory and no link inside the cache: {name.removeprefix('./new/')}"
        )


def _cache_script(place: Place, *arguments: str) -> None:
    command = ["/usr/bin/python3", "-I", "-S", f"{GUEST_SCRIPTS}/image-cache.py", *arguments]
    place.run(command, {"PATH": contract.SYSTEM_PATH}, contract.GUEST).check("looking at what is cached")


def _after_root(plan: BuildPlan, place: Place) -> None:
    words = (contract.TREE, contract.HOOKS, plan.spec.install_type, *_manifest_directories(plan))
    result = guest_script(place, "tree.sh", "after_root", *words)
    if result.exit_status == _NO_TREE_STATUS:
        raise ScriptError(
            "root.d ended without a root file system in place",
            hint="the operating-system element must fill $TARGET_ROOT in its root.d",
        )
    result.check("preparing the tree after root.d")


def _manifest_directories(plan: BuildPlan) -> tuple[str, ...]:
    """What source-repositories wants to be there.

    It makes a name of what is behind the last dot of TMP_MOUNT_PATH, where DIB's own path has one.
    """
    if plan.facts.on_host is not None or all(element.name != "source-repositories" for element in plan.elements):
        return ()
    cache = contract.for_phase(plan.facts, Phase.EXTRA_DATA)["DIB_IMAGE_CACHE"]
    return (f"{cache}/source-repositories/dib-manifest-git-{plan.spec.name}_{contract.BUILD_DIR.rpartition('/')[0]}",)


def _install_packages(plan: BuildPlan, phases: Phases, place: Place) -> None:
    packages = plan.spec.extra_packages
    with phases.step("extra packages"):
        result = place.run(
            [f"{contract.GUEST}/guest/chroot-command.sh", contract.TREE, contract.HOOKS, "install-packages", *packages],
            contract.for_phase(plan.facts, Phase.INSTALL),
            "/",
            on_output=phases.monitor.output,
        )
        if result.exit_status != 0:
            error = ScriptError(
                f"installing the extra packages {', '.join(packages)}: install-packages failed with exit status "
                f"{result.exit_status}",
                hint="an element must provide install-packages, and the packages must exist; "
                + phases.advice(plan.facts, Where.CHROOT),
                details=phases.monitor.tail(LAST_LINES),
            )
            phases.shells.after_error(place, Phase.INSTALL, plan.facts, error)
            raise error


def _is_set(variables: Mapping[str, str], name: str) -> bool:
    return (variables.get(name) or "0") != "0"


def _size_kib(text: bytes, most_bytes: int) -> int:
    """What the place measured, if it can be."""
    if re.fullmatch(rb"[0-9]{1,12}\n?", text) is None:
        raise ApplianceError("measuring the tree: the guest gave no number")
    size_kib = int(text)
    if not 0 < size_kib * 1024 < max(most_bytes, staging.BUILD_DISK_BYTES):
        raise ApplianceError(f"measuring the tree: {size_kib} KiB cannot be")
    return size_kib
