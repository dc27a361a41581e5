# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
# Made from the table of options when virt-dib is built.

_virt_dib()
{
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]}
    COMPREPLY=()
    # bash has split '--option=value' into three words.
    if [[ $cur == "=" ]]; then
        cur=
    elif [[ $prev == "=" ]] && ((COMP_CWORD > 1)); then
        prev=${COMP_WORDS[COMP_CWORD - 2]}
    fi
    case $prev in
@VALUES@
    esac
    if [[ $cur == -* ]]; then
        _virt_dib_words "@NAMES@"
    else
        _virt_dib_words "$(_virt_dib_elements)"
    fi
}

_virt_dib_words()
{
    mapfile -t COMPREPLY < <(compgen -W "$1" -- "$cur")
}

# Several words in one, separated by commas.
_virt_dib_list()
{
    local word before=
    [[ $cur != *,* ]] || before=${cur%,*},
    for word in $1; do
        [[ ,$before == *,$word,* || $before$word != "$cur"* ]] || COMPREPLY+=("$before$word")
    done
}

_virt_dib_paths()
{
    compopt -o filenames 2>/dev/null
    mapfile -t COMPREPLY < <(compgen "$1" -- "$cur")
}

# Those that the command on the line finds where the line has it search.
_virt_dib_elements()
{
    local arguments=() i option
    for ((i = 1; i < COMP_CWORD; i++)); do
        case ${COMP_WORDS[i]} in
            -B) option=-B ;;
            -p | --element-path) option=-p ;;
            *) continue ;;
        esac
        [[ ${COMP_WORDS[i + 1]} != "=" ]] || ((i++))
        arguments+=("$option" "${COMP_WORDS[i + 1]/#\~\//$HOME/}")
    done
    "${COMP_WORDS[0]/#\~\//$HOME/}" "${arguments[@]}" --list-elements 2>/dev/null
}

complete -F _virt_dib virt-dib
