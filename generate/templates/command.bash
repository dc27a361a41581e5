# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
# Made from the table of options when virt-dib is built.

@FUNCTION@()
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
        @FUNCTION@_words "@NAMES@"
    else
        @ARGUMENTS@
    fi
}

@FUNCTION@_words()
{
    mapfile -t COMPREPLY < <(compgen -W "$1" -- "$cur")
}

# Several words in one, separated by commas.
@FUNCTION@_list()
{
    local word before=
    [[ $cur != *,* ]] || before=${cur%,*},
    for word in $1; do
        [[ ,$before == *,$word,* || $before$word != "$cur"* ]] || COMPREPLY+=("$before$word")
    done
}

@FUNCTION@_paths()
{
    compopt -o filenames 2>/dev/null
    mapfile -t COMPREPLY < <(compgen "$1" -- "$cur")
}

@ELEMENTS@
complete -F @FUNCTION@ @COMMAND@
