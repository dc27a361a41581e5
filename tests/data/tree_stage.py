# SPDX-License-Identifier: Apache-2.0
"""Runs the tree stage of a build in the sandbox, and no virtual machine: tree_stage.py LOOK ARGUMENT...

The arguments are those of virt-dib. LOOK is text for a bash that runs in the sandbox at the end, in the tree.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

from virt_dib import environment as contract
from virt_dib import extra_data, sandbox
from virt_dib.cli import report_errors
from virt_dib.command_line import parse
from virt_dib.interrupts import interrupts
from virt_dib.monitor import BuildMonitor, Display
from virt_dib.phases import Phases
from virt_dib.plan import make_plan
from virt_dib.tree_stage import make_tree
from virt_dib.workspace import open_workspace


def run(look: str, arguments: list[str]) -> int:
    command = parse(arguments)
    with interrupts(), Display(sys.stdout) as display, open_workspace() as workspace:
        plan = make_plan(command.spec, workspace, command.problems, in_sandbox=True)
        monitor = BuildMonitor(display)
        with monitor.following(command.spec), monitor.logging(Path(f"{command.spec.name}.log")):
            host = None
            if plan.facts.on_host is not None:
                host = extra_data.prepare(plan.facts, plan.staging, workspace / "on-host")
            settings = sandbox.Settings(directory=plan.staging.finish(), network=command.spec.network)
            with sandbox.open_sandbox(settings) as box:
                content = extra_data.Content(directory=box.directory, ids=box.ids)
                open_host = None if host is None else functools.partial(extra_data.open_host, host, content)
                make_tree(plan, Phases(plan.hooks.owners, monitor), box, open_host=open_host)
                seen = bytearray()
                box.run(
                    ["/bin/bash", "-c", look], {"PATH": contract.SYSTEM_PATH}, contract.BUILT, on_output=seen.extend
                )
                Path("look").write_bytes(seen)
    return 0


sys.exit(report_errors("virt-dib", lambda: run(sys.argv[1], sys.argv[2:])))
