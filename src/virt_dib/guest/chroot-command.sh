#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# chroot-command.sh ROOT COMMAND...: run one command inside ROOT by its shell, as DIB's run_in_target.

set -eu

root=$1
shift
exec chroot "$root" /bin/sh -c "$*"
