#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# in-chroot.sh ROOT HOOKS PHASE TOKEN: run one phase inside ROOT, with HOOKS seen read-only at
# /tmp/in_target.d for as long as the phase takes (DIB's run_d_in_target).

set -eu

root=$1
hooks=$2
phase=$3
token=$4
here=${BASH_SOURCE[0]%/*}

if [[ ! -d $hooks/$phase ]]; then
    exit 0
fi
if [[ ! -x $root/bin/bash && ! -L $root/bin ]]; then
    echo "no bash in the image: $phase cannot run" >&2
    exit 127
fi

cp "$here/run-phase.sh" "$hooks/virt-dib-run-phase"
if [[ -n ${_LIB:-} && -f ${_LIB:-}/dib-run-parts ]]; then
    cp "$_LIB/dib-run-parts" "$hooks/"
fi
mkdir "$root/tmp/in_target.d"
mount --bind "$hooks" "$root/tmp/in_target.d"
mount -o remount,ro,bind "$hooks" "$root/tmp/in_target.d"

status=0
chroot "$root" /bin/bash /tmp/in_target.d/virt-dib-run-phase "/tmp/in_target.d/$phase" "$token" || status=$?

# A process the phase left behind may still have a file open there.
umount "$root/tmp/in_target.d" 2>/dev/null || umount -l "$root/tmp/in_target.d"
rmdir "$root/tmp/in_target.d"
exit "$status"
