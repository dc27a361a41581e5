#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# run-phase.sh PHASE_DIRECTORY TOKEN: run the scripts of one phase, outside or inside the chroot.
#
# The rules are those of DIB's dib-run-parts: which files are scripts, their order, environment.d
# sourced once in the shell that starts them, the first failure ends the phase with its status.
# Events are records between RS characters on standard output:
#   TOKEN list NAME...     TOKEN source NAME     TOKEN start NAME SECONDS     TOKEN end NAME STATUS SECONDS

set -ue
set -o pipefail

virt_dib_directory=$1
virt_dib_token=$2

virt_dib_event() {
    printf '\036%s %s\036' "$virt_dib_token" "$*"
}

# Seconds since the epoch; EPOCHREALTIME came with bash 5.
virt_dib_now() {
    if [[ -n ${EPOCHREALTIME:-} ]]; then
        virt_dib_time=$EPOCHREALTIME
    else
        virt_dib_time=$(date +%s.%N)
    fi
}

# $1 directory, $2 regular expression for names, $3 test for a candidate: -x or -f
virt_dib_names() (
    shopt -s nullglob dotglob
    for path in "$1"/*; do
        name=${path##*/}
        if [[ -f $path && $name =~ $2 ]] && test "$3" "$path"; then
            printf '%s\n' "$name"
        fi
    done
)

virt_dib_scripts=()
while IFS= read -r virt_dib_name; do
    virt_dib_scripts+=("$virt_dib_name")
done < <(virt_dib_names "$virt_dib_directory" "${RUN_PARTS_REGEX:-^[0-9A-Za-z_-]+$}" -x | LC_ALL=C sort -n)
virt_dib_event list ${virt_dib_scripts[@]+"${virt_dib_scripts[@]}"}

(
    if [[ -d $virt_dib_directory/../environment.d ]]; then
        while IFS= read -r virt_dib_name <&9; do
            virt_dib_event source "$virt_dib_name"
            set -o xtrace
            # shellcheck disable=SC1090 # files of the elements
            source "$virt_dib_directory/../environment.d/$virt_dib_name"
            { set +o xtrace; } 2>/dev/null
        done 9< <(virt_dib_names "$virt_dib_directory/../environment.d" '^[0-9A-Za-z_.-]+$' -f | LC_ALL=C sort)
    fi
    for virt_dib_name in ${virt_dib_scripts[@]+"${virt_dib_scripts[@]}"}; do
        virt_dib_now
        virt_dib_event start "$virt_dib_name" "$virt_dib_time"
        virt_dib_status=0
        "$virt_dib_directory/$virt_dib_name" 9<&- || virt_dib_status=$?
        virt_dib_now
        virt_dib_event end "$virt_dib_name" "$virt_dib_status" "$virt_dib_time"
        [[ $virt_dib_status == 0 ]] || exit "$virt_dib_status"
    done
)
