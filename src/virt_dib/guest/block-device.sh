#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# block-device.sh DIRECTORY ANSWERS COMMAND...: have the process behind 'block-device.py --serve DIRECTORY' run
# commands of dib-block-device with the variables of this one; if something has ended it, run them without it.

set -eu

directory=$1
shift
if [[ -p $directory/request ]] && pgrep -f "block-device.py --serve $directory" >/dev/null; then
    rm -f "$directory/status"
    env -0 >"$directory/variables"
    echo "$*" >"$directory/request"
    cat "$directory/reply"
    if [[ ! -s $directory/status ]]; then
        echo "the process behind dib-block-device was killed, perhaps for want of memory" >&2
        exit 137
    fi
    exit "$(<"$directory/status")"
fi
exec /usr/bin/python3 -S "${BASH_SOURCE[0]%/*}/block-device.py" "$@"
