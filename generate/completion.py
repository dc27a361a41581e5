# SPDX-License-Identifier: Apache-2.0
"""Completion for bash, zsh and fish, from the tables of options and templates."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from virt_dib import dib_command, dib_links, image_file_cli
from virt_dib.options import GROUPS, LISTS, OFFERS, Offer, Option, Takes

TEMPLATES = Path(__file__).parent / "templates"
SHELLS = ("bash", "zsh", "fish")


@dataclass(frozen=True, kw_only=True)
class Command:
    """What there is to complete for one command."""

    name: str
    options: Sequence[Option]
    arguments: Offer
    """What its arguments are."""
    offers: Mapping[str, Offer | Sequence[str]] = field(default_factory=dict)
    """What its options take, by destination."""
    elements: str | None = None
    """Whose templates find elements."""

    @property
    def function(self) -> str:
        """The function of the shells that completes it, and the beginning of the names of its others."""
        return "_" + self.name.replace("-", "_")

    @property
    def names(self) -> Sequence[str]:
        """All spellings of its options."""
        return sorted(name for option in self.options for name in option.names)

    def offer(self, option: Option) -> Offer | Sequence[str]:
        """What it offers as the value of *option*."""
        return self.offers.get(option.dest, ())

    @property
    def values(self) -> Sequence[Option]:
        """The options that take a value."""
        return [option for option in self.options if option.wants_value]


def _of_parser(build: Callable[[], argparse.ArgumentParser]) -> Iterator[Option]:
    """The options of a command that argparse reads."""
    with _in_english():
        parser = build()
    for action in parser._actions:  # noqa: SLF001 - argparse tells them nowhere else
        takes = Takes.NOTHING if action.nargs == 0 else Takes.VALUE
        if isinstance(action, argparse._AppendAction):  # noqa: SLF001 - nor what they are
            takes = Takes.VALUES
        metavar = None if takes is Takes.NOTHING else str(action.metavar)
        if action.option_strings:
            yield Option(tuple(action.option_strings), action.dest, takes, metavar, action.help or "")


@contextlib.contextmanager
def _in_english() -> Iterator[None]:
    """Whoever builds the package has a language, which is none of its users' business."""
    before = os.environ.get("LANGUAGE")
    os.environ["LANGUAGE"] = "en"
    try:
        yield
    finally:
        del os.environ["LANGUAGE"]
        if before is not None:
            os.environ["LANGUAGE"] = before


_DROP_INS = [
    Command(
        name=name,
        options=dib_command.OPTIONS,
        arguments=Offer.ELEMENT,
        offers={**OFFERS, "log": Offer.FILE},
        elements="drop-in",
    )
    for name in (dib_command.DISK_PROG, dib_command.RAMDISK_PROG)
]
COMMANDS: Mapping[str, Command] = {
    command.name: command
    for command in (
        Command(
            name="virt-dib",
            options=[option for options in GROUPS.values() for option in options],
            arguments=Offer.ELEMENT,
            offers=OFFERS,
            elements="virt-dib",
        ),
        *_DROP_INS,
        Command(
            name=image_file_cli.PROG,
            options=list(_of_parser(image_file_cli.build_parser)),
            arguments=Offer.FILE,
            offers={"result": Offer.FILE},
        ),
        Command(name=dib_links.PROG, options=list(_of_parser(dib_links.build_parser)), arguments=Offer.DIRECTORY),
    )
}


def script(command: Command, shell: str) -> str:
    """The completion of *command* in one of ``SHELLS``."""
    marks = {"bash": _bash_marks, "zsh": _zsh_marks, "fish": _fish_marks}[shell](command)
    elements = _template(f"elements.{command.elements}", shell) if command.elements else ""
    text = _template("command", shell).replace("@ELEMENTS@\n", f"{elements}\n" if elements else "")
    for mark, content in {**marks, "@FUNCTION@": command.function, "@COMMAND@": command.name}.items():
        text = text.replace(mark, content)
    return text


def _template(name: str, shell: str) -> str:
    return (TEMPLATES / f"{name}.{shell}").read_text(encoding="utf-8")


def _brief(option: Option) -> str:
    """What an option does, without defaults and the like."""
    return re.split(r"; | \(", option.help, maxsplit=1)[0]


# ---- bash ----

_BASH_OFFERS = {
    Offer.FILE: "@FUNCTION@_paths -f",
    Offer.DIRECTORY: "@FUNCTION@_paths -d",
    Offer.ELEMENT: '@FUNCTION@_words "$(@FUNCTION@_elements)"',
    Offer.VARIABLE: 'mapfile -t COMPREPLY < <(compgen -v -- "$cur")',
}


def _bash_marks(command: Command) -> Mapping[str, str]:
    return {
        "@VALUES@": "\n".join(_bash_values(command)),
        "@NAMES@": " ".join(command.names),
        "@ARGUMENTS@": _BASH_OFFERS[command.arguments],
    }


def _bash_values(command: Command) -> Iterator[str]:
    for option in command.values:
        lines = [f"    {_bash_offer(option, command.offer(option))}", "    return", "    ;;"]
        yield "\n".join(f"        {line}" for line in [f"{' | '.join(option.names)})", *lines])


def _bash_offer(option: Option, offer: Offer | Sequence[str]) -> str:
    if isinstance(offer, Offer):
        return _BASH_OFFERS[offer]
    words = " ".join(offer)
    if not words:
        return ":"
    return f'@FUNCTION@_list "{words}"' if option.dest in LISTS else f'@FUNCTION@_words "{words}"'


# ---- zsh ----

_ZSH_OFFERS = {
    Offer.FILE: "_files",
    Offer.DIRECTORY: "_files -/",
    Offer.ELEMENT: "@FUNCTION@_elements",
    Offer.VARIABLE: "_parameters -g '*export*'",
}
_ZSH_ARGUMENTS = {Offer.FILE: "*:file:", Offer.DIRECTORY: ":directory:", Offer.ELEMENT: "*:element:"}


def _zsh_marks(command: Command) -> Mapping[str, str]:
    arguments = f"'{_ZSH_ARGUMENTS[command.arguments]}{_ZSH_OFFERS[command.arguments]}'"
    return {"@OPTIONS@": "\n".join(_zsh_options(command)), "@ARGUMENTS@": arguments}


def _zsh_options(command: Command) -> Iterator[str]:
    for option in command.options:
        again = option.takes is Takes.VALUES or option.dest == dib_command.TRACING
        others = "*" if again else f"({' '.join(option.names)})"
        tail = _zsh_tail(option, command.offer(option))
        for name in option.names:
            yield f"    {shlex.quote(f'{others}{name}{_zsh_value_mark(name, option)}{tail}')} \\"


def _zsh_value_mark(name: str, option: Option) -> str:
    """The value may stand in the same word: after ``=``, or at once."""
    if option.takes is Takes.VALUE_OR_NOTHING:
        return "=-"
    if not option.wants_value:
        return ""
    return "=" if name.startswith("--") else "+"


def _zsh_tail(option: Option, offer: Offer | Sequence[str]) -> str:
    text = re.sub(r"([\[\]:\\])", r"\\\1", _brief(option))
    if option.takes is Takes.VALUE_OR_NOTHING:
        return f"[{text}]::{option.metavar}:"
    if not option.wants_value:
        return f"[{text}]"
    if isinstance(offer, Offer):
        action = _ZSH_OFFERS[offer]
    elif option.dest in LISTS:
        action = f"_sequence compadd - {' '.join(offer)}"
    else:
        action = f"({' '.join(offer)})" if offer else ""
    return f"[{text}]:{re.sub(r'[^A-Za-z=]', '', option.metavar or '')}:{action}"


# ---- fish ----

_FISH_OFFERS = {
    Offer.FILE: "-F",
    Offer.DIRECTORY: "-a '(__fish_complete_directories)'",
    Offer.ELEMENT: "-a '(_@FUNCTION@_elements)'",
    Offer.VARIABLE: "-a '(set -nx)'",
}


def _fish_marks(command: Command) -> Mapping[str, str]:
    exclusive = "" if command.arguments is Offer.FILE else "-f "
    arguments = f"complete -c @COMMAND@ {exclusive}{_FISH_OFFERS[command.arguments]}"
    return {"@OPTIONS@": "\n".join(_fish_options(command)), "@ARGUMENTS@": arguments}


def _fish_options(command: Command) -> Iterator[str]:
    for option in command.options:
        names = [f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in option.names]
        words = ["complete -c @COMMAND@", *names, f"-d {_fish_quoted(_brief(option))}"]
        if option.wants_value:
            offer = command.offer(option)
            words += ["-x" if offer is not Offer.FILE else "-r", *_fish_offer(option, offer)]
        yield " ".join(words)


def _fish_offer(option: Option, offer: Offer | Sequence[str]) -> Iterator[str]:
    if isinstance(offer, Offer):
        yield _FISH_OFFERS[offer]
    elif option.dest in LISTS:
        yield f"-a '(_@FUNCTION@_list {' '.join(offer)})'"
    elif offer:
        yield f"-a '{' '.join(offer)}'"


def _fish_quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
