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
exec "$here/with-hooks.sh" "$root" "$hooks" \
    /bin/bash /tmp/in_target.d/virt-dib-run-phase "/tmp/in_target.d/$phase" "$token"
