#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# chroot-shell.sh ROOT HOOKS COMMAND: run COMMAND by the shell of ROOT, on a terminal, with all that a phase has there.

set -eu

root=$1
hooks=$2
command=$3

# For who runs the scripts of a phase by hand.
if [[ -n ${_LIB:-} && -f ${_LIB:-}/dib-run-parts ]]; then
    cp "$_LIB/dib-run-parts" "$hooks/"
fi
exec "${BASH_SOURCE[0]%/*}/with-hooks.sh" "$root" "$hooks" /bin/sh -c "$command"
