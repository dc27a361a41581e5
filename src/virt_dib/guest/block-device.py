# SPDX-License-Identifier: Apache-2.0
"""Run several commands of DIB's dib-block-device in one Python.

    block-device.py ANSWERS COMMAND [COMMAND ...]
    block-device.py --serve DIRECTORY SITE

Each COMMAND is one of dib-block-device's (``init``, ``create`` ...), ``getval:KEY``, ``check``, which
builds the graph of devices without making any, so that a wrong configuration is found early, or ``mounts``,
which tells what 'create' has made and mounted. What the getval commands and 'mounts' print goes into the JSON
file ANSWERS. The configuration is the one that the variable
DIB_BLOCK_DEVICE_PARAMS_YAML names.

Python needs seconds to import DIB in an emulated guest. With ``--serve`` a process does that in the background, from
the directory SITE, while the tree is still being made, and then takes commands, and the variables that go with
them, through pipes in DIRECTORY: see block-device.sh.
"""

import contextlib
import io
import json
import os
import sys
import traceback

import dib_compat


def check() -> None:
    """Build DIB's node graph from the configuration and throw it away."""
    import yaml  # noqa: PLC0415 - see load
    from diskimage_builder.block_device import blockdevice  # noqa: PLC0415 - seconds, emulated

    try:
        from diskimage_builder.block_device import config  # noqa: PLC0415 - as above
    except ImportError:
        config = None
    if not hasattr(config, "create_graph") or not hasattr(blockdevice, "BlockDeviceState"):
        # DIB 2.4 and 2.5 have them elsewhere. Then 'create' says what is wrong.
        return

    with open(os.environ["DIB_BLOCK_DEVICE_PARAMS_YAML"]) as stream:
        params = yaml.safe_load(stream)
    params.setdefault("image-size", "1TiB")
    device = blockdevice.BlockDevice(params)
    config.create_graph(device.config, params, blockdevice.BlockDeviceState())


def run(command: str) -> str:
    """Run one command of dib-block-device; return what it printed on standard output."""
    from diskimage_builder.block_device import cmd  # noqa: PLC0415 - see load

    sys.argv = ["dib-block-device", *command.split(":", 1)]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        cmd.main()
    return printed.getvalue().rstrip("\n")


def mounts() -> str:
    """The file systems in the order of mounting: JSON of a list of objects."""
    import yaml  # noqa: PLC0415 - see load

    with open(os.environ["DIB_BLOCK_DEVICE_PARAMS_YAML"]) as stream:
        params = yaml.safe_load(stream)
    with open(os.path.join(params["build-dir"], "states", "block-device", "state.json")) as stream:
        state = json.load(stream)
    found = []
    for point in state["mount_order"]:
        file_system = state["filesys"][state["mount"][point]["base"]]
        if file_system["fstype"] != "swap":
            found.append({**file_system, "opts": file_system["opts"] or [], "mount_point": point})
    return json.dumps(found)


def perform(answers_path: str, commands: list[str]) -> str:
    """Run the commands. Return an empty text, or what went wrong: the command and the last thing DIB said."""
    load()
    answers = {}
    for command in commands:
        try:
            if command == "check":
                check()
            elif command == "mounts":
                answers[command] = mounts()
            else:
                answers[command] = run(command)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever DIB raises, it is reported
            if isinstance(error, SystemExit) and not error.code:
                continue
            # DIB asserts without a word what the user's sizes must fulfil: then the code says it.
            where = traceback.extract_tb(error.__traceback__)[-1].line
            return f"dib-block-device {command}: {type(error).__name__}: {str(error) or where}"
    with open(answers_path, "w") as stream:
        json.dump(answers, stream)
    return ""


def load() -> None:
    """Import DIB. Not at the top: a server first leaves the job that started it."""
    dib_compat.restore()
    import diskimage_builder.block_device.cmd  # noqa: F401, PLC0415 - imported ahead of its use


def serve(directory: str, site: str) -> None:
    """Go on in a child that no longer belongs to what started it, and serve requests for ever."""
    os.makedirs(directory, exist_ok=True)
    for name in ("request", "reply"):
        os.mkfifo(os.path.join(directory, name))
    if os.fork():
        return
    os.setsid()
    os.chdir("/")
    sys.path.insert(0, site)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nowhere, number)
    load()
    while True:
        with open(os.path.join(directory, "request")) as stream:
            answers_path, *commands = stream.read().split()
        with open(os.path.join(directory, "variables"), "rb") as stream:
            variables = dict(item.split(b"=", 1) for item in stream.read().split(b"\0") if item)
        os.environb.clear()
        os.environb.update(variables)
        reply = os.open(os.path.join(directory, "reply"), os.O_WRONLY)
        os.dup2(reply, 1)
        os.dup2(reply, 2)
        os.close(reply)
        failure = perform(answers_path, commands)
        sys.stderr.write(failure + "\n" if failure else "")
        with open(os.path.join(directory, "status"), "w") as stream:
            stream.write("1" if failure else "0")
        sys.stdout.flush()
        sys.stderr.flush()
        # The reader of the reply waits for this.
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)


def main() -> None:
    """Do what the command line asks for."""
    first, *rest = sys.argv[1:]
    if first == "--serve":
        serve(*rest)
        return
    failure = perform(first, rest)
    if failure:
        sys.exit(failure)


main()
