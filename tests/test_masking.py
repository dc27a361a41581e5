# SPDX-License-Identifier: Apache-2.0
"""What is a secret, and that virt-dib tells none: in the plan, messages, events, errors, and its lines of a log."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote, quote_plus, urlencode

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from helpers import make_element, virt_dib
from virt_dib import api, batch, environment, events, image_file, machine_readable
from virt_dib.cli import report_errors
from virt_dib.dib import find_installation
from virt_dib.errors import Problem, ToolError, UsageError, VirtDibError
from virt_dib.machine import Disk, Settings, _without_job, binding_problem, new_handle
from virt_dib.masking import MASK, Mask, is_secret
from virt_dib.monitor import BuildMonitor
from virt_dib.releases import NEWEST
from virt_dib.spec import BuildSpec, Phase

VALUE = "s3cr3t-Value/1234"


@pytest.mark.parametrize(
    "name",
    [
        "PASSWORD", "DIB_DEV_USER_PASSWORD", "db_password", "ADMINPASSWORD", "ROOT_PASSWD", "GPG_PASSPHRASE", "DB_PASS",
        "DB_PWD", "GITHUB_TOKEN", "GITHUBTOKEN", "NPM_TOKENS", "AWS_SECRET_ACCESS_KEY", "CLIENT_SECRET", "API_KEY",
        "APIKEY", "SSH_PRIVATE_KEY", "GPG_PRIVATE_KEY", "REG_ACTIVATION_KEY", "OS_CREDENTIALS", "AWS_CREDS", "DIB_KEYS",
        "DB_PASSWORD1", "DB_PASS1", "DB_PASSWORD_2", "TOKEN2", "TOKENS2", "KEY1", "AWS_SECRETKEY", "MINIO_ACCESSKEY",
        "SSH_PRIVATEKEY", "ENCRYPTIONKEY", "API_KEY_PROD", "SIGNING_KEY_B64", "LUKS_KEY_HEX", "ADMINPWD", "ROOTPW",
        "DB_PWD_OLD", "DBPASS", "GITHUB_PAT", "HTTP_AUTH", "DOCKER_AUTH_CONFIG", "BEARER", "TS_AUTHKEY", "DIB_SAT_KEY",
    ],
)  # fmt: skip
def test_names_of_secrets(name: str) -> None:
    assert is_secret(name, VALUE)


@pytest.mark.parametrize(
    "name",
    [
        "PATH", "PWD", "OLDPWD", "KEYMAP", "DIB_KEYBOARD", "DIB_APT_KEYRING", "DIB_DEBIAN_KEYRING", "DIB_ADD_APT_KEYS",
        "DIB_DEV_USER_AUTHORIZED_KEYS", "ZUUL_USER_SSH_PUBLIC_KEY", "DIB_IPA_KEY_FILE", "DIB_DEV_USER_PWDLESS_SUDO",
        "PASSWORDLESS", "BYPASS", "COMPASS", "TOKENIZER", "DIB_TOKEN_URL", "TOKEN_TTL", "AWS_ACCESS_KEY_ID", "KEYS_DIR",
        "SECRETARY", "DIB_RELEASE", "DIB_REPOLOCATION_keystone", "MONKEY", "DIB_GPG_KEY", "CREDENTIAL_HELPER", "_", "",
        "KEYRING1", "DIB_APT_KEY2", "PUBLIC_SSH_KEY", "SSH_PUBLIC_KEY_1", "SSH_PUBLIC_KEY_PROD", "KEY_FILE2",
        "OS_AUTH_URL", "SSH_AUTH_SOCK", "DIB_CLOUD_INIT_ALLOW_SSH_PWAUTH", "DIB_GPG_KEY_SERVER", "PATTERN", "DIB_PATH",
        "AUTHOR", "1", "_2",
    ],
)  # fmt: skip
def test_names_of_what_is_none(name: str) -> None:
    assert not is_secret(name, VALUE)


@pytest.mark.parametrize(
    "value",
    [
        "",
        "1",
        "yes",
        "False",
        "/etc/passwd",
        "file:///etc",
        "ssh-ed25519 AAAAC3Nza me",
        "ssh-rsa AAAAB3NzaC1yc2E= of two words\necdsa-sha2-nistp256 AAAAE2VjZHNh\n",
        "sk-ssh-ed25519@openssh.com AAAAGnNr me",
        "-----BEGIN CERTIFICATE-----\nMII",
        "-----BEGIN PGP PUBLIC KEY BLOCK-----\n\nmQ",
    ],
)
def test_values_that_are_no_secrets_whatever_their_name(value: str) -> None:
    assert not is_secret("MY_SECRET_KEY", value)


@pytest.mark.parametrize(
    "value",
    [
        "sk-horse battery staple",
        "ssh-horse battery staple",
        "ssh-rsa battery staple",
        "ssh-ed25519 AAAAC3Nza me\nhorse battery staple",
        "-----BEGIN CERTIFICATE OF A HORSE",
        "-----BEGIN CERTIFICATE-----\nMII\n-----BEGIN RSA PRIVATE KEY-----\nMII",
    ],
)
def test_values_that_only_begin_like_public_keys(value: str) -> None:
    assert is_secret("DB_PASSWORD", value)


def test_the_secrets_among_the_variables_of_dibs_elements() -> None:
    """No others: people are to see how their image is built."""
    files = [path for path in find_installation(None).elements_dir.rglob("*") if path.is_file()]
    names = {name for path in files for name in re.findall(r"\b[A-Z][A-Z0-9_]+\b", path.read_text(errors="replace"))}
    assert {"DIB_DEV_USER_AUTHORIZED_KEYS", "DIB_ADD_APT_KEYS", "DIB_DEBIAN_KEYRING"} <= names
    assert {name for name in names if name.startswith(("DIB_", "REG_")) and is_secret(name, VALUE)} == {
        "DIB_DEV_USER_PASSWORD", "DIB_RHSM_PASSWORD", "DIB_SAT_KEY", "REG_ACTIVATION_KEY", "REG_PASSWORD",
    }  # fmt: skip


def test_the_address_of_a_key_is_none_but_of_a_secret_may_be_one() -> None:
    address = "https://example.com/key.asc"
    assert not is_secret("DIB_EXTRA_KEY", address)
    assert is_secret("WEBHOOK_SECRET", address)


@pytest.mark.parametrize("value", ["/no/such/path+base64==", "/wJalrXUtnFEMI/K7MDENG", "a\0/b", "/x\0"])
def test_what_only_looks_like_a_path_is_a_secret(value: str) -> None:
    assert is_secret("API_KEY", value)


# ---- texts ----


@pytest.mark.parametrize(
    ("text", "without"),
    [
        (f"cannot use '{VALUE}' as x", f"cannot use '{MASK}' as x"),
        (f"TOKEN={VALUE}x", f"TOKEN={MASK}"),
        ("PASSWORD=abc", f"PASSWORD={MASK}"),
        ("the root of root.d", "the root of root.d"),
        ("--envvar API_KEY='two words' tiny-os", f"--envvar API_KEY={MASK} tiny-os"),
        ("DIB_RELEASE=trixie", "DIB_RELEASE=trixie"),
        ("https://me:pw@example.com/x", f"https://me:{MASK}@example.com/x"),
        ("https://me:it's-secret@example.com/x", f"https://me:{MASK}@example.com/x"),
        ("https://me:p@ssw0rd@example.com/x@y", f"https://me:{MASK}@example.com/x@y"),
        ("https://it's-a-token-with@in-it@example.com/", f"https://{MASK}@example.com/"),
        ("socks5h://:pw@example.com", f"socks5h://:{MASK}@example.com"),
        ("https://ghp_0123456789abcdefghij@example.com", f"https://{MASK}@example.com"),
        ("https://git@example.com:8080/a@b", "https://git@example.com:8080/a@b"),
        ("first line of it\nsecond line of it", f"{MASK}"),
        ("only second line of it", f"only {MASK}"),
        ("don'\"'\"'t tell anybody", f"{MASK}"),
    ],
)
def test_texts(text: str, without: str) -> None:
    mask = Mask({
        "MY_TOKEN": VALUE, "SHORT_PASSWORD": "root", "LONG_SECRET": "first line of it\nsecond line of it",
        "QUOTED_SECRET": "don't tell anybody", "OTHER": "as x",
    })  # fmt: skip
    assert mask(text) == without


@pytest.mark.parametrize(
    "piece",
    ["x", "=", "a=", "_", "a_=", "://", "a://", "http://", "https://x", "'", "='", '="', ":@", "A://b:", "PASS_"],
)
def test_long_texts_take_no_longer_than_their_length(piece: str) -> None:
    """Or this would take hours."""
    text = piece * ((1 << 20) // len(piece))
    assert Mask({"MY_TOKEN": VALUE})(f"{text} {VALUE}") == f"{text} {MASK}"


@given(st.text(), st.text(min_size=8))
def test_no_text_holds_a_secret_afterwards(text: str, secret: str) -> None:
    if is_secret("A_SECRET", secret) and secret.strip() == secret and MASK not in secret and secret not in MASK:
        assert secret not in Mask({"A_SECRET": secret})(f"{text}{secret}").replace(MASK, "\n")


QUOTES = [("", ""), ("'", "'"), ('"', '"'), ("'it\\'s \"", "\"'")]

ENCODINGS: dict[str, Callable[[str], str]] = {
    "itself": str,
    "URL": lambda text: quote(text, safe=""),
    "URL, lower case": lambda text: re.sub("%..", lambda found: found[0].lower(), quote(text, safe="")),
    "path of a URL": quote,
    "form": quote_plus,
    "query": lambda text: urlencode({"x": text}).removeprefix("x="),
    "repr": repr,
    "repr of a longer text": lambda text: repr(f"""it's "{text}\""""),
    "ascii": ascii,
    "JSON": json.dumps,
    "JSON with other letters": lambda text: json.dumps(text, ensure_ascii=False),
    "shell": shlex.quote,
}


@given(st.text(st.sampled_from("aB3/ +&%'\"\\\tä字"), min_size=8), st.sampled_from(list(ENCODINGS)))
@example('p@ss/w rd+\'s "ü"', "repr of a longer text")
def test_no_text_holds_an_encoded_secret_afterwards(secret: str, encoding: str) -> None:
    if is_secret("A_SECRET", secret) and len(secret.strip()) >= 8:
        encoded = ENCODINGS[encoding](secret)
        assert Mask({"A_SECRET": secret})(f"<{encoded}>") in {f"<{quotes[0]}{MASK}{quotes[1]}>" for quotes in QUOTES}


def test_a_job_is_not_in_what_libguestfs_tells_of_its_calls() -> None:
    told = 'write "/jobs/12.sh" "export A=1\\nexport API_KEY=s3cr"<truncated, original size 812 bytes>'
    assert _without_job(told) == 'write "/jobs/12.sh" "..."'
    assert _without_job(f"internal_{told}") == 'internal_write "/jobs/12.sh" "..."'
    assert _without_job('write "/build/config.yaml" "text"') == 'write "/build/config.yaml" "text"'


@pytest.mark.skipif(binding_problem() is not None, reason="this Python has no libguestfs")
def test_what_variables_have_libguestfs_trace_is_looked_at_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LIBGUESTFS_TRACE", "1")
    told: list[str] = []
    settings = Settings(
        disks=[Disk(path=tmp_path / "disk", label="build")], cache_dir=tmp_path / "cache", memory_mib=512, cpus=1,
        network=False, accelerate=False, on_debug=told.append,
    )  # fmt: skip
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    handle = new_handle(settings)
    capfd.readouterr()
    handle.get_path()
    handle.close()
    assert "libguestfs: trace: get_path" in told
    assert "get_path" not in capfd.readouterr().err


# ---- what a build says ----


@pytest.fixture
def spec(tmp_path: Path) -> BuildSpec:
    return BuildSpec(name="x", output_dir=tmp_path, elements=("e",), variables={"API_KEY": VALUE})


def test_events_the_log_and_errors_of_a_build(
    spec: BuildSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOST_PASSWORD", "of the host alone")
    told: list[events.Event] = []
    monitor = BuildMonitor(told.append)
    said = f"{VALUE}, and of the host alone"

    def build() -> int:
        with monitor.following(spec), monitor.logging(tmp_path / "x.log"):
            monitor.message(said)
            monitor.warning(said)
            monitor.debug(said)
            monitor.output(f"a script prints {VALUE}\n".encode())
            raise ToolError(said, hint=said, details=(said,))

    assert report_errors("virt-dib", build) == 1
    log = (tmp_path / "x.log").read_text()
    assert log.count(VALUE) == 1
    assert f"a script prints {VALUE}\n" in log
    assert "of the host alone" not in log
    lines = [line for line in map(machine_readable.event_json, told) if line is not None]
    texts = "".join([*lines, *capsys.readouterr()])
    assert VALUE not in texts
    assert "of the host alone" not in texts
    assert [json.loads(line)["message"] for line in lines if MASK in line] == [
        f"{MASK}, and {MASK}", f"{MASK}, and {MASK}", f"{MASK}, and {MASK}", f"{MASK}, and {MASK}",
    ]  # fmt: skip


def test_what_nobody_has_thought_of(spec: BuildSpec) -> None:
    told: list[events.Event] = []
    monitor = BuildMonitor(told.append)
    with pytest.raises(ZeroDivisionError), monitor.following(spec):
        raise ZeroDivisionError(f"with {VALUE}")
    (error,) = [event for event in told if isinstance(event, events.ErrorFound)]
    assert error.text == f"stopped by ZeroDivisionError: with {MASK}"


def test_the_error_of_a_plan(spec: BuildSpec) -> None:
    wrong = Problem(f"cannot use '{VALUE}'", f"not '{VALUE}'", (VALUE,))
    with pytest.raises(VirtDibError) as error:
        api.plan_image(spec, problems=[wrong])
    assert VALUE not in str(error.value)
    assert error.value.problems[0] == Problem(f"cannot use '{MASK}'", f"not '{MASK}'", (MASK,))


def test_a_slip_on_the_command_line(tmp_path: Path) -> None:
    """Written for an option, and taken for an element."""
    run = virt_dib(["--name", "x", f"API_KEY={VALUE}", f"--envvars=DB_PASSWORD={VALUE}"], cwd=tmp_path)
    assert run.exit_status == 2
    assert VALUE not in run.stdout + run.stderr
    assert f"API_KEY={MASK}" in run.stderr


def test_a_script_that_fails_in_the_plan_of_the_command(tmp_path: Path) -> None:
    make_element(tmp_path, "tiny", {"root.d/10-x": "#!/bin/sh\n"})
    arguments: list[str | Path] = [
        "-p",
        tmp_path,
        "--size",
        f"{VALUE}",
        "--envvar",
        f"API_KEY={VALUE}",
        "--name",
        "x",
        "tiny",
    ]
    run = virt_dib(arguments, cwd=tmp_path)
    assert run.exit_status == 2
    assert VALUE not in run.stdout + run.stderr
    assert f"cannot use '{MASK}' as the size of the image" in run.stderr


# ---- files of images ----


def test_the_commands_of_images(tmp_path: Path) -> None:
    text = (
        f'- imagename: a\n  environment: {{API_KEY: "{VALUE}", DIB_RELEASE: trixie, http_proxy: "http://u:pw@h:1"}}\n'
    )
    (tmp_path / "images.yaml").write_text(f"{text}  elements: [vm]\n")
    (request,) = image_file.read([tmp_path / "images.yaml"]).requests
    shown = batch.shown(request)
    assert f"API_KEY='{MASK}' DIB_RELEASE=trixie http_proxy='http://u:{MASK}@h:1' " in shown
    assert request.environment["API_KEY"] == VALUE


@pytest.mark.parametrize("value", ["123456", "1" * 80, "2026-01-01"])
def test_mistakes_in_files_of_images(tmp_path: Path, value: str) -> None:
    (tmp_path / "images.yaml").write_text(f"- environment:\n    DB_PASSWORD: {value}\n    DIB_RELEASE: {value}\n")
    with pytest.raises(UsageError) as error:
        image_file.read([tmp_path / "images.yaml"])
    first, second = error.value.problems
    assert value[:50] not in f"{first.message} {first.hint}"
    assert MASK in first.message
    assert value[:50] in second.message


# ---- what the elements are told of the command line, and may write into the image ----


@pytest.mark.parametrize("words", [["--envvar", f"API_KEY={VALUE}"], [f"--envvar=API_KEY={VALUE}"]])
def test_the_manifests_of_an_image_hold_no_secret(spec: BuildSpec, words: list[str]) -> None:
    facts = environment.Facts(
        spec=BuildSpec(
            name="x",
            output_dir=spec.output_dir,
            elements=("e",),
            variables={"API_KEY": VALUE, "DIB_ROOT_PASSWORD": VALUE, "DIB_RELEASE": "trixie"},
            arguments=(*words, "--envvar", "DIB_RELEASE=trixie", "e"),
        ),
        elements=(),
        element_dirs={},
        elements_path=(),
        block_devices=environment.BlockDevices(root_label="", root_fstype="", boot_label="", mount_points=""),
        rules=NEWEST,
    )
    seen = environment.for_phase(facts, Phase.INSTALL)
    assert (seen["API_KEY"], seen["DIB_ROOT_PASSWORD"]) == (VALUE, VALUE)
    assert VALUE not in seen["DIB_ARGS"] + seen["DIB_ENV"]
    assert seen["DIB_ARGS"].endswith("--envvar DIB_RELEASE=trixie e")
    assert 'declare -x DIB_RELEASE="trixie"' in seen["DIB_ENV"]


def test_no_secret_of_this_process_is_hidden_by_chance() -> None:
    """What every shell has is no secret, or messages would have holes."""
    usual = ("HOME", "PATH", "PWD", "USER", "LANG", "SHELL", "TERM", "SSH_AUTH_SOCK", "GPG_AGENT_INFO")
    assert [name for name in usual if is_secret(name, os.environ.get(name, "/somewhere"))] == []
