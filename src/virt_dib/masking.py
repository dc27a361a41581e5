# SPDX-License-Identifier: Apache-2.0
"""Passwords and the like, kept out of what virt-dib itself says: messages, errors, its lines in logs, events.

What scripts print is theirs, and stays in the log as it is (docs/security.md).
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping

MASK = "***"

_SECRET_WORD = re.compile(
    r".*(?:PASSWORDS?|PASSWD|PASSPHRASE|SECRETS?|TOKENS?|APIKEY|PRIVKEY)|PASS|PW|CREDENTIALS?|CREDS"
)
_KEYS = frozenset({"KEY", "KEYS"})
_OPEN_KEYS = frozenset({"APT", "AUTHORIZED", "GPG", "PGP", "PUB", "PUBLIC", "RPM"})
"""Just before KEY: those that anybody may know."""
_ABOUT = frozenset({
    "COUNT", "DIR", "DIRECTORY", "ENABLED", "FILE", "FILES", "FORMAT", "HELPER", "ID", "IDS", "KEYRING", "LENGTH",
    "METHOD", "MODE", "NAME", "PATH", "SIZE", "SOCK", "TTL", "TYPE", "URI", "URL", "VERSION",
})  # fmt: skip
"""As the last word of a name: it says something about a secret, or where it is."""
_HARMLESS = re.compile(
    r"|[01]|true|false|yes|no|on|off|(?:ssh|ecdsa|sk)-\S+ .*|-----BEGIN (?:PGP PUBLIC|PUBLIC KEY|CERTIFICATE).*",
    re.IGNORECASE | re.DOTALL,
)
"""Switches, public keys and certificates."""
_PLAIN_URL = re.compile(r"(?:https?|ftp)://[^@?\s]*")
_SHORT = 8
"""A value with fewer characters is likely to be part of other words, and hidden only where its name is before it."""

_ASSIGNMENT = re.compile(r"(?<![A-Za-z0-9_])(?P<name>[A-Za-z_][A-Za-z0-9_]*)=(?P<value>'[^']*'|\"[^\"]*\"|[^\s'\"]+)")
_PASSWORD_IN_URL = re.compile(r"(?P<before>(?<![A-Za-z0-9+.-])[A-Za-z0-9+.-]{1,30}://[^/\s:@'\"]*):[^/\s@'\"]+@")
_TOKEN_IN_URL = re.compile(r"(?P<before>(?<![A-Za-z0-9])https?://)[^/\s:@'\"]{20,}@")
"""Both begin where a word does: a text without blanks is looked through once, however long."""


def is_secret(name: str, value: str) -> bool:
    """Whether the *value* of a variable called *name* is to be shown to nobody. This is the one rule for it.

    Its name has a word such as PASSWORD, TOKEN, SECRET or CREDENTIALS, or KEY at its end; but not of public keys, and
    not one that ends with FILE, URL, ID and the like. No secrets are switches, public keys, and paths of what is there;
    nor is the address of a KEY.
    """
    *before, last = name.upper().split("_")
    words = [*before, last]
    secret = any(map(_SECRET_WORD.fullmatch, words)) or (last == "PWD" and bool(before))
    key = last in _KEYS and _OPEN_KEYS.isdisjoint(before[-1:]) and not _PLAIN_URL.fullmatch(value)
    if last in _ABOUT or not (secret or key) or _HARMLESS.fullmatch(value):
        return False
    return not _is_path(value)


def _is_path(value: str) -> bool:
    path = value.removeprefix("file://")
    return os.path.isabs(path) and os.path.exists(path)


def shown(name: str, value: str) -> str:
    """The value of a variable as people may see it."""
    return MASK if is_secret(name, value) else _without_assignments(value)


class Mask:
    """Hides the secrets among some variables, and what looks like one anywhere: ``NAME=VALUE`` and URLs."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        pairs = dict(
            pair for name, value in variables.items() if is_secret(name, value) for pair in _forms(name, value)
        )
        # The longest first: one may be part of another.
        self._hidden = sorted(pairs.items(), key=lambda pair: -len(pair[0]))

    def __call__(self, text: str) -> str:
        """*text* without secrets."""
        for secret, instead in self._hidden:
            text = text.replace(secret, instead)
        return _without_assignments(text)


def _forms(name: str, value: str) -> Iterator[tuple[str, str]]:
    """What a secret may look like in a text, and what is shown instead."""
    quoted = shlex.quote(value)
    if len(value) < _SHORT:
        yield f"{name}={value}", f"{name}={MASK}"
        yield f"{name}={quoted}", f"{name}={MASK}"
        return
    for form in (value, quoted.strip("'"), *value.splitlines()):
        if len(form.strip()) >= _SHORT:
            yield form, MASK


def _without_assignments(text: str) -> str:
    text = _PASSWORD_IN_URL.sub(rf"\g<before>:{MASK}@", text)
    text = _TOKEN_IN_URL.sub(rf"\g<before>{MASK}@", text)
    return _ASSIGNMENT.sub(_masked, text) if "=" in text else text


def _masked(found: re.Match[str]) -> str:
    name, value = found["name"], found["value"]
    return f"{name}={MASK}" if is_secret(name, value.strip("'\"")) else found[0]
