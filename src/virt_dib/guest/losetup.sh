#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# losetup for dib-block-device of DIB 2.0 to 2.3, which looks for the partitions of a new loop device at /dev/loop0p1:
# they are there only if the kernel is told to look for a partition table.

set -eu

losetup=$(PATH=/usr/sbin:/usr/bin:/sbin:/bin type -P losetup)
for argument; do
    [[ $argument != --show ]] || exec "$losetup" --partscan "$@"
done
exec "$losetup" "$@"
