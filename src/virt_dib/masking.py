# SPDX-License-Identifier: Apache-2.0
"""Passwords and the like, kept out of what virt-dib itself says: messages, errors, its lines in logs, events.

What scripts print is theirs, and stays in the log as it is (docs/security.md).
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from urllib.parse import quote

MASK = "***"

_SECRET_WORD = re.compile(
    r".*(?:PASSWORDS?|PASSWD|PASSPHRASE|SECRETS?|TOKENS?|CREDENTIALS?|PW|PWD)"
    r"|.*(?:ACCESS|ACTIVATION|API|AUTH|ENCRYPTION|MASTER|PASS|PRIV|PRIVATE|SECRET|SIGNING)KEYS?"
    r"|(?:ADMIN|DB|LDAP|MYSQL|ROOT|SSH|SUDO|USER)?PASS|AUTH|BEARER|CREDS?|PAT"
)
_PLACES = frozenset({"PWD", "OLDPWD"})
"""Every shell's own variables, whose names look like those of passwords."""
_KEYS = frozenset({"KEY", "KEYS"})
_PUBLIC = frozenset({"AUTHORIZED", "PUB", "PUBLIC"})
_OPEN_KEYS = frozenset({"APT", "GPG", "PGP", "RPM"})
"""Just before KEY: those that packages are verified with."""
_ABOUT = frozenset({
    "ALGORITHM", "COUNT", "DIR", "DIRECTORY", "ENABLED", "FILE", "FILES", "FINGERPRINT", "FORMAT", "HELPER", "HOST",
    "ID", "IDS", "KEYRING", "LENGTH", "METHOD", "MODE", "NAME", "PATH", "PORT", "SERVER", "SIZE", "SOCK", "TTL", "TYPE",
    "URI", "URL", "USER", "USERNAME", "VERSION",
})  # fmt: skip
"""As the last word of a name: it says something about a secret, or where it is."""
_SSH_KEY = (
    r"(?:ssh-(?:rsa|dss|ed25519)|ecdsa-sha2-nistp[0-9]{3}|sk-(?:ssh-ed25519|ecdsa-sha2-nistp256)@openssh\.com)"
    r" AAAA[A-Za-z0-9+/]+={0,2}(?:[ \t][^\r\n]*)?"
)
_HARMLESS = re.compile(
    r"|(?i:[01]|true|false|yes|no|on|off)"
    rf"|(?:{_SSH_KEY}\s*)+"
    r"|(?s:-----BEGIN (?:PGP PUBLIC KEY BLOCK|(?:RSA )?PUBLIC KEY|(?:TRUSTED )?CERTIFICATE)-----(?!.*PRIVATE KEY).*)"
)
"""Switches, public keys and certificates. The data of an SSH key begin with the length of its type, which is AAAA."""
_PLAIN_URL = re.compile(r"(?:https?|ftp)://[^@?\s]*")
_SHORT = 8
"""A value with fewer characters is likely to be part of other words, and hidden only where its name is before it."""

_ASSIGNMENT = re.compile(r"(?<![A-Za-z0-9_])(?P<name>[A-Za-z_][A-Za-z0-9_]*)=(?P<value>'[^']*'|\"[^\"]*\"|[^\s'\"]+)")
_PASSWORD_IN_URL = re.compile(r"(?P<before>(?<![A-Za-z0-9+.-])[A-Za-z0-9+.-]{1,30}://[^/\s:@'\"]*):[^/\s\"]+@")
_TOKEN_IN_URL = re.compile(r"(?P<before>(?<![A-Za-z0-9])https?://)[^/\s:\"]{20,}@")
"""Up to the last @, which people leave as it is in passwords. Both begin where a word does: a text without blanks is
looked through once, however long."""


def is_secret(name: str, value: str) -> bool:
    """Whether the *value* of a variable called *name* is to be shown to nobody. This is the one rule for it.

    Its name has a word such as PASSWORD, TOKEN, SECRET, CREDENTIALS or KEY, whatever digits are behind it; but not of
    public keys, and not one that ends with FILE, URL, ID and the like. No secrets are switches, public keys, and paths
    of what is there; nor is the address of a KEY.
    """
    words = [word for word in (part.rstrip("0123456789") for part in name.upper().split("_")) if word]
    if not words or words[-1] in _ABOUT or name.upper() in _PLACES or _HARMLESS.fullmatch(value):
        return False
    if not any(map(_SECRET_WORD.fullmatch, words)) and (not _has_secret_key(words) or _PLAIN_URL.fullmatch(value)):
        return False
    return not _is_path(value)


def _has_secret_key(words: Sequence[str]) -> bool:
    return _PUBLIC.isdisjoint(words) and any(
        word in _KEYS and before not in _OPEN_KEYS for before, word in zip(("", *words), words, strict=False)
    )


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
    for piece in (value, *value.splitlines()):
        for form in (piece, *_encoded(piece)):
            if len(piece.strip()) >= _SHORT:
                yield form, MASK


def _encoded(text: str) -> Iterator[str]:
    """As command lines, URLs, Python's messages about what they were given, and JSON have it."""
    if (quoted := shlex.quote(text)) != text:
        yield quoted[1:-1]
    for percent in (quote(text, errors="surrogatepass"), quote(text, safe="", errors="surrogatepass")):
        for form in (percent, percent.replace("%20", "+")):
            yield form
            yield re.sub("%..", lambda found: found[0].lower(), form)
    # The double quote has repr take single ones around all, and escape those within.
    yield from (repr(text)[1:-1], repr(f'{text}"')[1:-2], ascii(text)[1:-1])
    yield from (json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1])


def _without_assignments(text: str) -> str:
    text = _PASSWORD_IN_URL.sub(rf"\g<before>:{MASK}@", text)
    text = _TOKEN_IN_URL.sub(rf"\g<before>{MASK}@", text)
    return _ASSIGNMENT.sub(_masked, text) if "=" in text else text


def _masked(found: re.Match[str]) -> str:
    name, value = found["name"], found["value"]
    return f"{name}={MASK}" if is_secret(name, value.strip("'\"")) else found[0]
