#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# sfdisk as it was before util-linux 2.26, for scripts of that time: numbers in its input are cylinders unless an
# option says otherwise. Taken for sectors, the first partition would leave no room for a bootloader.

set -eu

sfdisk=$(PATH=/usr/sbin:/usr/bin:/sbin:/bin type -P sfdisk)
for argument; do
    case $argument in
        -f | --force | -q | --quiet | -L | [!-]*) ;;
        *) exec "$sfdisk" "$@" ;;
    esac
done

# Heads and sectors that Linux has always given a disk without a geometry.
cylinder=$((255 * 63))
track=63
while IFS= read -r line || [[ -n $line ]]; do
    if [[ $line =~ ^[[:blank:]]*([0-9]+)([[:blank:],]+)([0-9]+)(.*)$ ]]; then
        start=${BASH_REMATCH[1]} between=${BASH_REMATCH[2]} size=${BASH_REMATCH[3]} rest=${BASH_REMATCH[4]}
        if ((size == 0)); then
            echo "$line"
        elif ((start == 0)); then
            echo "$track$between$((size * cylinder - track))$rest"
        else
            echo "$((start * cylinder))$between$((size * cylinder))$rest"
        fi
    elif [[ $line =~ ^[[:blank:]]*([0-9]+)(.*)$ ]]; then
        echo "$((BASH_REMATCH[1] * cylinder))${BASH_REMATCH[2]}"
    else
        echo "$line"
    fi
done | "$sfdisk" "$@"
