# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from virt_dib import environment, tools

BASH = tools.require("bash", purpose="run the tests", package="bash")
values = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=30)


def bash(text: str, variables: dict[str, str] | None = None) -> str:
    return tools.run(
        [BASH, "-c", text], doing="running bash", environment={"LC_ALL": "C.UTF-8", **(variables or {})}
    ).stdout


@given(st.dictionaries(st.from_regex(r"T_[A-Za-z0-9_]{1,8}", fullmatch=True), values, max_size=3))
def test_exports_give_bash_the_very_values(variables: dict[str, str]) -> None:
    seen = bash(environment.exports(variables) + "exec env -0")
    pairs = dict(item.split("=", 1) for item in seen.split("\0") if item)
    # Line ends are translated by the text layer of the test, not by bash.
    wanted = {name: value.replace("\r\n", "\n").replace("\r", "\n") for name, value in variables.items()}
    found = {
        name: value.replace("\r\n", "\n").replace("\r", "\n") for name, value in pairs.items() if name.startswith("T_")
    }
    assert found == wanted


@given(values)
def test_declarations_set_the_variables_again(value: str) -> None:
    text = environment.declarations({"DIB_X": value, "OTHER": "not DIB's"})
    assert "OTHER" not in text
    assert bash(text.replace("declare -x", "declare -gx") + '\nprintf "%s|" "$DIB_X"') == value + "|"


def test_declarations_look_like_those_of_bash() -> None:
    values = {"DIB_A": "plain", "DIB_B": "two words", "DIB_C": 'a "quote" $x `y` \\', "DIB_D": "line\nand\ttab's"}
    theirs = bash("declare -p $(compgen -v | grep ^DIB_)", values)
    assert environment.declarations(values) == theirs.rstrip("\n")


def test_what_belongs_to_the_host_stays_there() -> None:
    host = {
        "TMPDIR": "/t", "PATH": "/p", "HOME": "/h", "SSH_AUTH_SOCK": "/s", "XDG_RUNTIME_DIR": "/x", "LD_PRELOAD": "l",
        "VIRTUAL_ENV": "v", "PYTHONPATH": "p", "BASH_FUNC_f%%": "() { :; }", "http_proxy": "http://proxy:3128",
        "DIB_REPOREF_x": "main", "GIT_BASE": "b",
    }  # fmt: skip
    assert environment.from_host(host) == {
        "http_proxy": "http://proxy:3128", "DIB_REPOREF_x": "main", "GIT_BASE": "b",
    }  # fmt: skip
