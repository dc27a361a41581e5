#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# On the host: ends a program when virt-dib was killed, and could not do so itself.
#
#   host-guard.sh SIGNAL PREFIX
#
# Standard input is a pipe from virt-dib: first it brings the number of the program's process, which gets the signal
# (with the prefix '-' all of its group), and then it ends with virt-dib. If all goes well, virt-dib kills this one.

# The tree of processes that gets KILL has got TERM before.
trap '' HUP INT TERM

# When a process began, in ticks; nothing if there is none.
begun() {
    line=
    read -r line <"/proc/$1/stat"
    # The first two fields are its number and its name, which may have blanks and brackets in it (proc(5)).
    set -f
    # shellcheck disable=SC2086 # it is to become many words
    set -- ${line##*) }
    echo "${20-}"
}

read -r process || exit 0
then=$(begun "$process")
read -r _
now=$(begun "$process")
# Another one may have the number by now, but not as long as there is somebody in the group.
[ -z "$now" ] || [ "$now" = "$then" ] || exit 0
kill -s "$1" -- "$2$process"
