# SPDX-License-Identifier: Apache-2.0
"""Completion for bash, zsh and fish, from the table of options and a template each."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from virt_dib.options import BY_NAME, GROUPS, LISTS, OFFERS, Offer, Option, Takes

TEMPLATES = Path(__file__).parent / "templates"


def scripts() -> Mapping[str, str]:
    """The completion scripts, by the names they are installed with."""
    makers: Mapping[str, Callable[[], Mapping[str, str]]] = {
        "virt-dib.bash": lambda: {"@VALUES@": "\n".join(_bash_values()), "@NAMES@": " ".join(sorted(BY_NAME))},
        "_virt-dib": lambda: {"@OPTIONS@": "\n".join(_zsh_options())},
        "virt-dib.fish": lambda: {"@OPTIONS@": "\n".join(_fish_options())},
    }
    return {name: _filled(TEMPLATES / name, make()) for name, make in makers.items()}


def _filled(template: Path, marks: Mapping[str, str]) -> str:
    text = template.read_text(encoding="utf-8")
    for mark, content in marks.items():
        text = text.replace(mark, content)
    return text


def _options() -> Iterator[Option]:
    for options in GROUPS.values():
        yield from options


def _brief(option: Option) -> str:
    """What an option does, without defaults and the like."""
    return re.split(r"; | \(", option.help, maxsplit=1)[0]


# ---- bash ----

_BASH_OFFERS = {
    Offer.FILE: "_virt_dib_paths -f",
    Offer.DIRECTORY: "_virt_dib_paths -d",
    Offer.ELEMENT: '_virt_dib_words "$(_virt_dib_elements)"',
    Offer.VARIABLE: 'mapfile -t COMPREPLY < <(compgen -v -- "$cur")',
}


def _bash_values() -> Iterator[str]:
    for option in _options():
        if option.wants_value:
            lines = [f"    {_bash_offer(option)}", "    return", "    ;;"]
            yield "\n".join(f"        {line}" for line in [f"{' | '.join(option.names)})", *lines])


def _bash_offer(option: Option) -> str:
    offer = OFFERS.get(option.dest, ())
    if isinstance(offer, Offer):
        return _BASH_OFFERS[offer]
    words = " ".join(offer)
    if not words:
        return ":"
    return f'_virt_dib_list "{words}"' if option.dest in LISTS else f'_virt_dib_words "{words}"'


# ---- zsh ----

_ZSH_OFFERS = {
    Offer.FILE: "_files",
    Offer.DIRECTORY: "_files -/",
    Offer.ELEMENT: "_virt_dib_elements",
    Offer.VARIABLE: "_parameters -g '*export*'",
}


def _zsh_options() -> Iterator[str]:
    for option in _options():
        others = f"({' '.join(option.names)})" if option.takes is not Takes.VALUES else "*"
        for name in option.names:
            yield f"    {shlex.quote(f'{others}{name}{_zsh_value_mark(name, option)}{_zsh_tail(option)}')} \\"


def _zsh_value_mark(name: str, option: Option) -> str:
    """The value may stand in the same word: after ``=``, or at once."""
    if option.takes is Takes.VALUE_OR_NOTHING:
        return "=-"
    if not option.wants_value:
        return ""
    return "=" if name.startswith("--") else "+"


def _zsh_tail(option: Option) -> str:
    text = re.sub(r"([\[\]:\\])", r"\\\1", _brief(option))
    if option.takes is Takes.VALUE_OR_NOTHING:
        return f"[{text}]::{option.metavar}:"
    if not option.wants_value:
        return f"[{text}]"
    offer = OFFERS.get(option.dest, ())
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
    Offer.ELEMENT: "-a '(__virt_dib_elements)'",
    Offer.VARIABLE: "-a '(set -nx)'",
}


def _fish_options() -> Iterator[str]:
    for option in _options():
        names = [f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in option.names]
        words = ["complete -c virt-dib", *names, f"-d {_fish_quoted(_brief(option))}"]
        if option.wants_value:
            words += ["-x" if OFFERS.get(option.dest) is not Offer.FILE else "-r", *_fish_offer(option)]
        yield " ".join(words)


def _fish_offer(option: Option) -> Iterator[str]:
    offer = OFFERS.get(option.dest, ())
    if isinstance(offer, Offer):
        yield _FISH_OFFERS[offer]
    elif option.dest in LISTS:
        yield f"-a '(__virt_dib_list {' '.join(offer)})'"
    elif offer:
        yield f"-a '{' '.join(offer)}'"


def _fish_quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
