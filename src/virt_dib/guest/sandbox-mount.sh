#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# mount for the sandbox. Each device node in its /dev is a mount, and 'mount --bind /dev' would leave them behind.
# What else is mounted there stays behind, as it would with the /dev of a kernel.

set -eu

mount=$(PATH=/usr/bin:/bin type -P mount)
arguments=("$@")
devices=
for argument; do
    [[ $argument != /dev && $argument != /dev/ ]] || devices=1
done
[[ -n $devices ]] || exec "$mount" "$@"

bound=
for number in "${!arguments[@]}"; do
    case ${arguments[number]} in
        --bind | -B) arguments[number]=--rbind bound=1 ;;
        bind) arguments[number]=rbind bound=1 ;;
        -obind | --options=bind) arguments[number]=-orbind bound=1 ;;
    esac
done
[[ -n $bound ]] || exec "$mount" "$@"
"$mount" "${arguments[@]}"
umount "${arguments[-1]}/pts" "${arguments[-1]}/shm"
