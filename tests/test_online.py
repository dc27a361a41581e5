# SPDX-License-Identifier: Apache-2.0
"""The network of a build: none where it is not wanted, the host's certificates, proxies, and hints."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from helpers import Run, make_element
from test_contract import CHROOT, answer, environment, probe_dir
from test_failures import errors, fail, hints, output_dir
from test_plan import place, planned, refused
from virt_dib import environment as contract
from virt_dib import online, tools
from virt_dib.environment import BlockDevices, Facts
from virt_dib.errors import UsageError
from virt_dib.spec import BuildSpec, Phase, Where

__all__ = ["output_dir", "place", "probe_dir"]  # fixtures

INSIDE = "/tmp/in_target.d/virt-dib-certificates"
BUNDLE_VARIABLES = (
    "SSL_CERT_FILE", "CURL_CA_BUNDLE", "GIT_SSL_CAINFO", "PIP_CERT", "REQUESTS_CA_BUNDLE", "NODE_EXTRA_CA_CERTS",
)  # fmt: skip


def facts_of(
    variables: Mapping[str, str] | None = None,
    host: Mapping[str, str] | None = None,
    *,
    certificates: str | None = "/etc/ssl/bundle",
    network: bool = True,
    host_certificates: bool = True,
) -> Facts:
    """The facts of a build of nothing."""
    spec = BuildSpec(
        name="x",
        output_dir=Path(),
        elements=(),
        variables=variables or {},
        network=network,
        host_certificates=host_certificates,
    )
    nothing = BlockDevices(root_label="", root_fstype="", boot_label="", mount_points="")
    return Facts(
        spec=spec,
        elements=(),
        element_dirs={},
        elements_path=(),
        block_devices=nothing,
        host_environment=host or {},
        certificates=certificates,
    )


@pytest.fixture(scope="module")
def own_ca(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A certificate and its private key."""
    directory = tmp_path_factory.mktemp("ca")
    openssl = tools.require("openssl", purpose="make a CA", package="openssl")
    words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=test -keyout key -out crt"
    tools.run([openssl, *words.split()], doing="making a CA", cwd=directory)
    return (directory / "crt").read_text(), (directory / "key").read_text()


# ---- the host's certificates ----


def test_only_certificates_are_taken_over(own_ca: tuple[str, str], tmp_path: Path) -> None:
    certificate, key = own_ca
    broken = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
    (tmp_path / "bundle").write_bytes(b"# \xff\n" + f"{key}{certificate}# a secret\n{broken}{certificate}".encode())
    found = online.host_certificates({"SSL_CERT_FILE": str(tmp_path / "bundle")})
    assert found == online.Certificates(source=tmp_path / "bundle", text=certificate)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file or directory"),
        (b"", "there is none in it"),
        (b"x" * ((16 << 20) + 1), "it is longer than 16 MiB"),
    ],
    ids=["missing", "empty", "too long"],
)
def test_a_file_of_the_users_that_cannot_be(tmp_path: Path, content: bytes | None, reason: str) -> None:
    bundle = tmp_path / "bundle"
    if content is not None:
        bundle.write_bytes(content)
    with pytest.raises(UsageError, match=rf"{reason}$") as caught:
        online.host_certificates({"SSL_CERT_FILE": str(bundle)})
    assert f"which SSL_CERT_FILE says are in '{bundle}'" in str(caught.value)
    assert "--no-host-certificates" in str(caught.value.problems[0].hint)


def test_what_is_no_file_is_not_read() -> None:
    with pytest.raises(UsageError, match=r"it is not a file$"):
        online.host_certificates({"SSL_CERT_FILE": "/dev/zero"})


def test_they_are_staged_unless_an_option_says_no(place: Path, own_ca: tuple[str, str]) -> None:
    environ = {"SSL_CERT_FILE": str(place / "bundle")}
    (place / "bundle").write_text(own_ca[0])
    made = planned(place, environ)
    assert (made.staging.directory / "host-certificates.crt").read_text() == own_ca[0]
    assert made.facts.certificates == str(place / "bundle")
    (place / "bundle").unlink()
    for option in ("network", "host_certificates"):
        start_anew(place)
        without = planned(place, environ, **{option: False})
        assert not (without.staging.directory / "host-certificates.crt").exists()
        assert without.facts.certificates is None
    start_anew(place)
    assert "SSL_CERT_FILE" in str(refused(place, environ))


def start_anew(place: Path) -> None:
    shutil.rmtree(place / "work")
    (place / "work").mkdir()


@pytest.mark.parametrize("phase", Phase)
def test_variables_name_them_where_they_are(phase: Phase) -> None:
    host = dict.fromkeys((*BUNDLE_VARIABLES[:2], "APT_CONFIG"), "/home/me/file")
    seen = contract.for_phase(facts_of(host=host), phase)
    found = {name: seen[name] for name in (*BUNDLE_VARIABLES, "APT_CONFIG", "SYSTEM_WGETRC") if name in seen}
    if phase.where is Where.CHROOT:
        bundles = dict.fromkeys(BUNDLE_VARIABLES, f"{INSIDE}/ca-bundle.crt")
        assert found == {**bundles, "APT_CONFIG": f"{INSIDE}/apt.conf", "SYSTEM_WGETRC": f"{INSIDE}/wgetrc"}
    elif phase is Phase.EXTRA_DATA:
        assert found == dict.fromkeys(BUNDLE_VARIABLES[:2], "/dib/host-certificates.crt")
    else:
        assert found == {}


@pytest.mark.parametrize("phase", Phase)
def test_without_them_no_variable_names_them(phase: Phase) -> None:
    seen = contract.for_phase(facts_of(host={"SSL_CERT_FILE": "/home/me/file"}, certificates=None), phase)
    assert not {*BUNDLE_VARIABLES, "APT_CONFIG", "SYSTEM_WGETRC"} & set(seen)


def test_the_users_variable_wins() -> None:
    seen = contract.for_phase(facts_of({"PIP_CERT": "/mine"}), Phase.INSTALL)
    assert seen["PIP_CERT"] == "/mine"
    assert seen["SSL_CERT_FILE"] == f"{INSIDE}/ca-bundle.crt"


# ---- proxies ----


def test_a_proxy_in_upper_case_is_one_for_all_programs() -> None:
    given = {"HTTP_PROXY": "http://one:1", "HTTPS_PROXY": "http://two:2", "https_proxy": "http://three:3"}
    seen = contract.for_phase(facts_of(given), Phase.INSTALL)
    assert {name: value for name, value in seen.items() if "proxy" in name.lower()} == {
        **given, "http_proxy": "http://one:1",
    }  # fmt: skip


@pytest.mark.parametrize(
    "value",
    [
        "http://127.0.0.1:3128", "127.0.0.53:3128", "localhost:3128", "http://user:secret@LocalHost:3128/", "http://[::1]:8",
        "socks5h://ip6-localhost:1080", "http://localhost.localdomain:8", "0.0.0.0:8080",
    ],
)  # fmt: skip
def test_a_proxy_on_the_loopback_is_none(value: str) -> None:
    given = {"HTTP_proxy": "http://[", "https_proxy": value, "no_proxy": "localhost", "OTHER": "localhost"}
    (problem,) = online.proxy_problems(given)
    assert "the proxy in the variable 'https_proxy' is at '" in problem.message
    assert "this host's loopback, which no build can reach" in problem.message
    assert "another address of this host" in str(problem.hint)
    assert "secret" not in f"{problem.message}{problem.hint}"


@pytest.mark.parametrize(
    "value", ["", "http://proxy.example:3128", "192.0.2.7:8", "http://[2001:db8::1]:8", "http://["]
)
def test_other_proxies_are_the_users_business(value: str) -> None:
    assert list(online.proxy_problems({"http_proxy": value})) == []


def test_a_proxy_on_the_loopback_is_refused_and_the_hosts_own_warned_of(place: Path) -> None:
    proxy = {"http_proxy": "http://localhost:3128"}
    assert "'http_proxy' is at 'localhost'" in str(refused(place, variables=proxy))
    assert planned(place, proxy, variables=proxy, network=False).warnings == ()
    make_element(place / "elements", "two", {"extra-data.d/50-x": "#!/bin/bash\n"})
    start_anew(place)
    (warning,) = planned(place, proxy, elements=("one", "two")).warnings
    assert warning.startswith("extra-data.d: the proxy in the variable 'http_proxy' is at 'localhost'")


# ---- hints ----

NOT_REACHED = [
    "curl: (6) Could not resolve host: nowhere.invalid",
    "fatal: unable to access 'https://nowhere.invalid/': Could not resolve host: nowhere.invalid",
    "  Temporary failure resolving 'deb.example.org'",
    "E: Failed to fetch http://deb.example.org/x  Could not connect to deb.example.org:80 (192.0.2.7).",
    "wget: unable to resolve host address 'nowhere.invalid'",
    "wget: bad address 'nowhere.invalid'",
    "urllib.error.URLError: <urlopen error [Errno -3] Temporary failure in name resolution>",
    "... Failed to establish a new connection: [Errno 101] Network is unreachable')': /simple/six/",
    "Curl error (6): Couldn't resolve host name for https://mirror.example/repodata/repomd.xml",
]
NOT_TRUSTED = [
    "curl: (60) SSL certificate problem: unable to get local issuer certificate",
    "fatal: unable to access 'https://x/': server certificate verification failed. CAfile: none CRLfile: none",
    "ssl.SSLCertVerificationError: [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed certificate",
    "ERROR: The certificate of 'pypi.example' is not trusted.",
    "  Certificate verification failed: The certificate is NOT trusted. The certificate issuer is unknown.",
    "tls: failed to verify certificate: x509: certificate signed by unknown authority",
]


@pytest.mark.parametrize("line", NOT_REACHED)
def test_hint_for_a_script_that_got_nowhere(line: str) -> None:
    lines = ["before", line, "E: Unable to locate package x"]
    proxy = {"https_proxy": "http://user:secret@proxy.example"}
    assert str(online.advice(lines, facts_of(network=False))).startswith("--no-network leaves scripts no network")
    assert "the proxy that the elements are given" in str(online.advice(lines, facts_of(proxy)))
    assert str(online.advice(lines, facts_of(host=proxy))).endswith("give it to them: --envvar https_proxy")
    assert "does this host itself reach" in str(online.advice(lines, facts_of()))


@pytest.mark.parametrize("line", NOT_TRUSTED)
def test_hint_for_a_script_that_trusted_nobody(line: str) -> None:
    assert "the CAs in '/etc/ssl/bundle' of this host" in str(online.advice([line], facts_of()))
    off = facts_of(certificates=None, host_certificates=False)
    assert "without --no-host-certificates" in str(online.advice([line], off))
    assert "SSL_CERT_FILE" in str(online.advice([line], facts_of(certificates=None)))


def test_no_hint_for_other_failures() -> None:
    lines = [
        "make: *** [all] Error 2",
        "cp: cannot stat 'x': No such file or directory",
        "E: Unable to locate package x",
    ]
    assert online.advice(lines, facts_of(network=False)) is None


# ---- in builds ----

SHOW = '#!/bin/bash\necho "offline: [$DIB_OFFLINE], interfaces: [$(cd /sys/class/net && echo *)]"\n'
FETCH = "busybox wget http://nowhere.invalid/ || status=$?; for i in {1..20}; do echo retry; done; exit $status\n"


@pytest.mark.option("--no-network")
@pytest.mark.appliance
@pytest.mark.parametrize(
    ("where", "shown"),
    [
        # The phases of the disk stage are in the appliance in any case.
        ("vm", [Phase.ROOT, Phase.PRE_INSTALL]),
        ("sandbox", [Phase.ROOT, Phase.INSTALL, Phase.PRE_FINALISE, Phase.FINALISE]),
    ],
)
def test_no_network_is_none_and_is_told(
    element_dir: Path, output_dir: Path, tmp_path: Path, where: str, shown: list[Phase]
) -> None:
    scripts = {f"{phase.directory}/70-show": SHOW for phase in shown}
    scripts[f"{shown[-1].directory}/80-fetch"] = f"#!/bin/bash\n{FETCH}"
    make_element(tmp_path / "elements", "online", scripts)
    arguments: list[str | Path] = [
        "--no-network",
        "--isolation",
        where,
        "--skip-base",
        "-p",
        element_dir,
        "-p",
        tmp_path / "elements",
    ]
    run = fail([*arguments, "tiny-os", "online"], output_dir, tmp_path)
    log = (output_dir / "disk.log").read_text()
    assert log.count("offline: [1], interfaces: [lo]") == len(shown)
    assert log.count("offline: [") == len(shown)
    assert f"{shown[-1].directory}/80-fetch of element 'online' failed" in errors(run)[0]
    assert hints(run)[0].startswith("virt-dib: hint: --no-network leaves scripts no network: ")
    assert "disk.log" in hints(run)[0]


@pytest.fixture(scope="module")
def certificates() -> str:
    """What this host trusts."""
    found = online.host_certificates(os.environ)
    if found is None:
        pytest.skip("this host has no CA certificates")
    return found.text


@pytest.mark.option("--host-certificates")
@pytest.mark.appliance
@pytest.mark.parametrize("phase", CHROOT)
def test_scripts_inside_see_the_hosts_certificates(probe_dir: Path, certificates: str, phase: Phase) -> None:
    seen = environment(probe_dir, phase)
    assert {seen[name] for name in BUNDLE_VARIABLES} == {f"{INSIDE}/ca-bundle.crt"}
    assert answer(probe_dir, phase, "certificates").split()[0] == hashlib.sha256(certificates.encode()).hexdigest()


@pytest.mark.appliance
def test_extra_data_sees_them_where_its_variables_say(probe_dir: Path, certificates: str) -> None:
    seen = environment(probe_dir, Phase.EXTRA_DATA)
    assert {seen.get(name) for name in BUNDLE_VARIABLES if name in os.environ} <= {"/dib/host-certificates.crt"}
    if "SSL_CERT_FILE" in os.environ:
        digest = hashlib.sha256(certificates.encode()).hexdigest()
        assert answer(probe_dir, Phase.EXTRA_DATA, "certificates").split()[0] == digest


@pytest.mark.appliance
def test_no_certificate_of_the_host_stays_in_the_image(probe_build: Run, certificates: str) -> None:
    """Not even in a block that no file has any more."""
    lines = {line.encode() for line in certificates.splitlines() if len(line) == 64}
    assert lines
    with (probe_build.output_dir / "probe.raw").open("rb") as image:
        assert not any(line.rstrip(b"\n") in lines for line in image)
