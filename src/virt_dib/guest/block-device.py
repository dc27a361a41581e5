# SPDX-License-Identifier: Apache-2.0
"""Run several commands of DIB's dib-block-device in one Python.

    block-device.py ANSWERS COMMAND [COMMAND ...]

Each COMMAND is one of dib-block-device's (``init``, ``create`` ...), ``getval:KEY`` or ``check``, which
builds the graph of devices without making any, so that a wrong configuration is found early. What the
getval commands print goes into the JSON file ANSWERS. The configuration is the one that the variable
DIB_BLOCK_DEVICE_PARAMS_YAML names. Starting Python and importing DIB once instead of six times matters
in an emulated guest.
"""

import contextlib
import io
import json
import os
import sys
import traceback

import yaml
from diskimage_builder.block_device import blockdevice, cmd, config


def check() -> None:
    """Build DIB's node graph from the configuration and throw it away."""
    with open(os.environ["DIB_BLOCK_DEVICE_PARAMS_YAML"]) as stream:
        params = yaml.safe_load(stream)
    params.setdefault("image-size", "1TiB")
    device = blockdevice.BlockDevice(params)
    config.create_graph(device.config, params, blockdevice.BlockDeviceState())


def run(command: str) -> str:
    """Run one command of dib-block-device; return what it printed on standard output."""
    sys.argv = ["dib-block-device", *command.split(":", 1)]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        cmd.main()
    return printed.getvalue().rstrip("\n")


def main() -> None:
    """Run the commands; a failing one is named, with the last thing DIB said."""
    answers_path, *commands = sys.argv[1:]
    answers = {}
    for command in commands:
        try:
            if command == "check":
                check()
            else:
                answers[command] = run(command)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever DIB raises, it is reported
            if isinstance(error, SystemExit) and not error.code:
                continue
            # DIB asserts without a word what the user's sizes must fulfil: then the code says it.
            where = traceback.extract_tb(error.__traceback__)[-1].line
            sys.exit(f"dib-block-device {command}: {type(error).__name__}: {str(error) or where}")
    with open(answers_path, "w") as stream:
        json.dump(answers, stream)


main()
