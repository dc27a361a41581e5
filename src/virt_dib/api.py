# SPDX-License-Identifier: Apache-2.0
"""virt-dib as a library: all that is public, and stays as it is. docs/python-api.md shows how to use it.

Names that are not here may change with any release.
"""

from virt_dib.boot import BootResult, Firmware, boot_kernel, boot_test
from virt_dib.break_points import Breaks
from virt_dib.builder import ImagePlan, RunOptions, build_image, plan_image
from virt_dib.errors import (
    ApplianceError,
    ElementError,
    Interrupted,
    PrerequisiteError,
    Problem,
    ScriptError,
    ToolError,
    UsageError,
    VirtDibError,
)
from virt_dib.events import (
    ArtifactMade,
    BuildFailed,
    BuildFinished,
    BuildPlanned,
    BuildStarted,
    Debugged,
    EnvironmentSourced,
    ErrorFound,
    Event,
    Listener,
    Message,
    Output,
    PhaseFinished,
    PhaseStarted,
    ScriptFinished,
    ScriptStarted,
    ShellClosed,
    ShellOpened,
    Warned,
    to_all,
)
from virt_dib.hooks import Script
from virt_dib.interrupts import Cancellation, interrupts
from virt_dib.machine_readable import event_json
from virt_dib.monitor import Display, summary
from virt_dib.prerequisites import Check, check_host
from virt_dib.report import Artifact, BuildReport, PhaseResult, ScriptResult
from virt_dib.spec import BuildSpec, ExtraData, Isolation, Kvm, Phase

__all__ = [
    "ApplianceError",
    "Artifact",
    "ArtifactMade",
    "BootResult",
    "Breaks",
    "BuildFailed",
    "BuildFinished",
    "BuildPlanned",
    "BuildReport",
    "BuildSpec",
    "BuildStarted",
    "Cancellation",
    "Check",
    "Debugged",
    "Display",
    "ElementError",
    "EnvironmentSourced",
    "ErrorFound",
    "Event",
    "ExtraData",
    "Firmware",
    "ImagePlan",
    "Interrupted",
    "Isolation",
    "Kvm",
    "Listener",
    "Message",
    "Output",
    "Phase",
    "PhaseFinished",
    "PhaseResult",
    "PhaseStarted",
    "PrerequisiteError",
    "Problem",
    "RunOptions",
    "Script",
    "ScriptError",
    "ScriptFinished",
    "ScriptResult",
    "ScriptStarted",
    "ShellClosed",
    "ShellOpened",
    "ToolError",
    "UsageError",
    "VirtDibError",
    "Warned",
    "boot_kernel",
    "boot_test",
    "build_image",
    "check_host",
    "event_json",
    "interrupts",
    "plan_image",
    "summary",
    "to_all",
]
