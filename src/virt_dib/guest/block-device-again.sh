#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# block-device-again.sh DIRECTORY ANSWERS COMMAND...: have the process that 'block-device.py --stay DIRECTORY' left
# run more commands; if something has ended it, start a new one.

set -eu

directory=$1
shift
if [[ -p $directory/request ]] && pgrep -f "block-device.py --stay $directory" >/dev/null; then
    echo "$*" >"$directory/request"
    cat "$directory/reply"
    exit "$(<"$directory/status")"
fi
exec /usr/bin/python3 -S "${BASH_SOURCE[0]%/*}/block-device.py" "$@"
