#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# image-places.sh IMAGE DEVICE...: print where each DEVICE lies in the raw image IMAGE of dib-block-device: offset
# and size in bytes, one line each. A device is the loop device of the image, or one of its partitions as kpartx
# makes them.

set -eu

image=$1
shift
for device; do
    size_bytes=$(blockdev --getsize64 "$device")
    offset_bytes=0
    if [[ $device == /dev/loop* ]]; then
        loop=${device#/dev/}
    else
        read -r start _ kind number first rest < <(dmsetup table "$device")
        [[ $start == 0 && $kind == linear && -z ${rest:-} ]]
        loop=$(basename "$(readlink -f "/sys/dev/block/$number")")
        offset_bytes=$((first * 512))
    fi
    [[ $(readlink -f "$(<"/sys/class/block/$loop/loop/backing_file")") == "$(readlink -f "$image")" ]]
    [[ $(<"/sys/class/block/$loop/loop/offset") == 0 ]]
    echo "$offset_bytes $size_bytes"
done
