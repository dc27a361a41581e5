# SPDX-License-Identifier: Apache-2.0
"""What virt-dib says, in the language of who reads it.

Messages are written in English, and stay so in logs, events and machine-readable output. Where people read them,
:func:`translated` finds the message in the catalogue: an entry has a placeholder where the message has a value, and
the text around the placeholders tells which entry it is. So no message is marked, and none is made twice.
"""

from __future__ import annotations

import functools
import gettext
import os
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

DOMAIN = "virt_dib"
LOCALE_DIR = Path(__file__).parent / "locale"
_VARIABLES = ("LANGUAGE", "LC_ALL", "LC_MESSAGES", "LANG")
_DEEPEST = 4
"""A value may be a message itself: the word for what a number is, a hint in a hint, what is wrong in a file."""


def translated(text: str) -> str:
    """*text* in the language that the environment asks for, or as it is where that has no translation of it."""
    return _catalogue(tuple(os.environ.get(name) for name in _VARIABLES)).translated(text)


@functools.cache
def _catalogue(_environment: Sequence[str | None]) -> Catalogue:
    found = gettext.translation(DOMAIN, LOCALE_DIR, fallback=True)
    entries: Mapping[object, str] = getattr(found, "_catalog", {})
    return Catalogue({entry: text for entry, text in entries.items() if entry and isinstance(entry, str)})


@dataclass(frozen=True, slots=True)
class _Entry:
    literals: tuple[str, ...]
    """The text before, between and after the placeholders."""
    names: tuple[str, ...]
    quoted: frozenset[str]
    """Those of the names whose values are in quotes."""
    translation: str

    @classmethod
    def of(cls, text: str, translation: str) -> _Entry:
        literals, names = [""], []
        for literal, name, _, _ in string.Formatter().parse(text):
            literals[-1] += literal
            if name is not None:
                names.append(name)
                literals.append("")
        quoted = {name for name, before in zip(names, literals, strict=False) if before.endswith("'")}
        return cls(tuple(literals), tuple(names), frozenset(quoted), translation)

    def values_in(self, text: str) -> Mapping[str, str] | None:
        """The values of the placeholders if *text* is this message. In time linear in it: it may be hostile."""
        first, *middle, last = self.literals
        position, end = len(first), len(text) - len(last)
        if position > end or not text.startswith(first) or not text.endswith(last):
            return None
        values = []
        for literal in middle:
            found = text.find(literal, position, end)
            if found < 0:
                return None
            values.append(text[position:found])
            position = found + len(literal)
        return dict(zip(self.names, [*values, text[position:end]], strict=True))


class Catalogue:
    """Entries and their translations. Both have the same placeholders, as ``str.format`` knows them."""

    def __init__(self, entries: Mapping[str, str]) -> None:
        made = {text: _Entry.of(text, translation) for text, translation in entries.items()}
        self._whole = {entry.literals[0]: _filled(entry.translation, {}) for entry in made.values() if not entry.names}
        with_values = [entry for entry in made.values() if entry.names]
        # The one that leaves least to the placeholders is meant.
        self._with_values = sorted(with_values, key=lambda entry: -sum(map(len, entry.literals)))

    def translated(self, text: str, *, depth: int = 0) -> str:
        """The translation of *text* and of its values, but for those in quotes, which are names; or itself."""
        if text in self._whole:
            return self._whole[text]
        if depth < _DEEPEST:
            for entry in self._with_values:
                values = entry.values_in(text)
                if values is not None:
                    spoken = values.keys() - entry.quoted
                    said = {name: self.translated(values[name], depth=depth + 1) for name in spoken}
                    return _filled(entry.translation, {**values, **said})
        return text


def _filled(translation: str, values: Mapping[str, str]) -> str:
    return translation.format_map(values)
