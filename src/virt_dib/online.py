# SPDX-License-Identifier: Apache-2.0
"""What it takes, besides interfaces, to get anywhere: CA certificates and proxies; and how to tell what was missing."""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket
import ssl
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from virt_dib.environment import Facts
from virt_dib.errors import Problem, UsageError

CERTIFICATES_VARIABLE = "SSL_CERT_FILE"
"""Names the file that the user's own programs trust, instead of the system's."""
_STORES = (
    "/etc/ssl/certs/ca-certificates.crt",  # Debian, Ubuntu, Arch, Gentoo
    "/etc/pki/tls/certs/ca-bundle.crt",  # Fedora and its relatives
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",  # the same, from Fedora 43 on
    "/etc/ssl/ca-bundle.pem",  # SUSE
    "/etc/ssl/cert.pem",  # Alpine
)
_MOST_BYTES = 16 << 20
"""A bundle of all public CAs has a quarter of a megabyte."""
_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----\s[A-Za-z0-9+/=\s]+-----END CERTIFICATE-----")
_PROXY = re.compile(r"(?:https?|ftp|all|rsync)_proxy", re.IGNORECASE)
_SOMEWHERE = ("192.0.2.1", 9)
"""No host (RFC 5737). To ask the kernel which way it would go sends nothing."""

_NOT_REACHED = re.compile(
    r"""could(?:\ not|n't)\ resolve|temporary\ failure\ (?:in\ name\ resolution|resolving)|unable\ to\ resolve
    |name\ or\ service\ not\ known|no\ address\ associated\ with|EAI_AGAIN|EAI_NONAME|bad\ address\ '
    |network\ is\ unreachable|no\ route\ to\ host|failed\ to\ establish\ a\ new\ connection
    |(?:could\ not|couldn't|failed\ to|unable\ to|cannot)\ connect\ to|cannot\ initiate\ the\ connection
    |connection\ timed\ out|can't\ connect\ to\ remote\ host""",
    re.IGNORECASE | re.VERBOSE,
)
"""How apt, curl, dnf, git, pip, wget and Python tell that they got nowhere."""
_NOT_TRUSTED = re.compile(
    r"""certificate[_ ]verif(?:y|ication)[_ ]failed|self[- ]signed\ certificate|unable\ to\ get\ (?:local\ )?issuer
    |SSL\ certificate\ (?:problem|verification)|server\ certificate\ verification\ failed|unknown\ authority
    |certificate\b.{0,200}\ is\ not\ trusted|cannot\ verify\ \S+\ certificate
    |issuer\ is\ (?:unknown|not\ recognized)
    |curl\ error\ \(60\)|error\ setting\ certificate""",
    re.IGNORECASE | re.VERBOSE,
)
"""The same, for certificates of a CA they do not know."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Certificates:
    """The CA certificates that programs of this host trust."""

    source: Path
    text: str
    """Certificates in PEM, and nothing else."""


# ---- certificates ----


def host_certificates(environment: Mapping[str, str]) -> Certificates | None:
    """The certificates in the file that SSL_CERT_FILE names or else in the system's store, or None without either.

    Only what OpenSSL reads as a certificate is taken over: a key in the file stays there.

    Raises:
        UsageError: the user's own file cannot be used.
    """
    named = environment.get(CERTIFICATES_VARIABLE)
    if named:
        try:
            return _read(Path(named))
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise UsageError(
                f"reading the CA certificates of this host, which {CERTIFICATES_VARIABLE} says are in '{named}': {why}",
                hint=f"correct {CERTIFICATES_VARIABLE}, unset it, or build with --no-host-certificates",
            ) from error
    for store in _STORES:
        with contextlib.suppress(OSError, ValueError):
            return _read(Path(store))
    return None


def _read(path: Path) -> Certificates:
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is not a file")
    with path.open("rb") as stream:
        data = stream.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise ValueError(f"it is longer than {_MOST_BYTES >> 20} MiB")
    found = [block for block in _CERTIFICATE.findall(data.decode("ascii", "replace")) if _is_certificate(block)]
    if not found:
        raise ValueError("there is none in it")
    return Certificates(source=path, text="".join(f"{block}\n" for block in dict.fromkeys(found)))


def _is_certificate(block: str) -> bool:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=block)
    except (ssl.SSLError, ValueError):
        return False
    return True


# ---- proxies ----


def proxy_problems(variables: Mapping[str, str]) -> Iterator[Problem]:
    """The proxies in *variables* that no build can reach: its loopback is its own."""
    for name, value in variables.items():
        host = _proxy_host(value) if _PROXY.fullmatch(name) else None
        if host is not None and _is_loopback(host):
            address = _address_of_this_host() or "one that 'ip address' shows"
            yield Problem(
                f"the proxy in the variable '{name}' is at '{host}', this host's loopback, which no build can reach",
                f"have it listen on another address of this host, such as {address}, and give that in '{name}'",
            )


def _proxy_host(value: str) -> str | None:
    """The host alone: there may be a password in the value."""
    try:
        return urlsplit(value if "://" in value else f"//{value}").hostname
    except ValueError:
        return None


def _is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return re.fullmatch(r"(?:.+\.)?localhost\.?|localhost\..*|ip6-(?:localhost|loopback)", host) is not None
    return address.is_loopback or address.is_unspecified


def _address_of_this_host() -> str | None:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        asked.connect(_SOMEWHERE)
        return str(asked.getsockname()[0])
    return None


# ---- what was missing ----


def advice(lines: Sequence[str], facts: Facts) -> str | None:
    """What to do about the network, if the last *lines* of a script that failed say that it got nowhere."""
    if any(map(_NOT_TRUSTED.search, lines)):
        return _about_trust(facts)
    if not any(map(_NOT_REACHED.search, lines)):
        return None
    if not facts.spec.network:
        return (
            "--no-network leaves scripts no network: build without it, or have what the script wants in its cache, "
            "which DIB_OFFLINE=1 tells elements to use"
        )
    if any(_PROXY.fullmatch(name) and value for name, value in facts.spec.variables.items()):
        return (
            "is the proxy that the elements are given the right one, and are all three http_proxy, "
            "https_proxy and no_proxy given?"
        )
    proxies = sorted(name for name, value in facts.host_environment.items() if _PROXY.fullmatch(name) and value)
    if proxies:
        given = " ".join(f"--envvar {name}" for name in proxies)
        return f"this host uses a proxy, of which elements learn only when you give it to them: {given}"
    return "does this host itself reach that? where it takes a proxy, give it to the elements: --envvar http_proxy=..."


def _about_trust(facts: Facts) -> str:
    if not facts.spec.host_certificates:
        return "without --no-host-certificates the script would trust the CAs that this host trusts"
    if facts.certificates is None:
        return f"no CA certificates were found on this host; name a file of them in {CERTIFICATES_VARIABLE}"
    return (
        f"scripts trust the CAs in '{facts.certificates}' of this host and in the image's own store; is that "
        "server's among them? not all programs take that over, see docs/network.md"
    )
