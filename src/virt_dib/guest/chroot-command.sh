#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# chroot-command.sh ROOT HOOKS COMMAND...: run one command inside ROOT by its shell, as DIB's run_in_target.

set -eu

root=$1
hooks=$2
shift 2
exec "${BASH_SOURCE[0]%/*}/with-hooks.sh" "$root" "$hooks" /bin/sh -c "$*"
