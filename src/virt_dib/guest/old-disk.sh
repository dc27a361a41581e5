#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# old-disk.sh STEP ...: the image disk as the runner of DIB made it itself, before 2.4.0.
# Steps that find a device write its name to /dib/build/block-device/device.

set -eu
set -o pipefail

answer=/dib/build/block-device/device

# Before block-device.d: a loop device for the raw image, whose partitions appear as DEVICEp1 and so on.
attach() {
    local image=$1
    losetup --partscan --show --find "$image" >"$answer"
}

# DIB 2.0 to 2.3, after a block-device.d that named no device. The configuration may come from the element vm, whose
# file the runner reads itself (disk-image-create, "well known config of a well known element").
table() {
    local size_kib=$1 path paths
    if [[ $IMAGE_ELEMENT == *vm* ]]; then
        IFS=: read -ra paths <<<"$ELEMENTS_PATH"
        for path in "${paths[@]}"; do
            if [[ -e $path/vm/environment.d/10-partitioning ]]; then
                # shellcheck source=/dev/null
                source "$path/vm/environment.d/10-partitioning"
            fi
        done
    fi
    dib-block-device --phase=create --config="${DIB_BLOCK_DEVICE_CONFIG:-}" --image-size="${size_kib}KiB" \
        --image-dir=/dib/image --build-dir=/dib/build >"$answer"
}

# The root file system on DEVICE, mounted at ROOT. Only ext has the UUID that elements were told.
make() {
    local device=$1 root=$2 fs_type=$3 label=$4 uuid=$5
    shift 5
    [[ $fs_type != ext* ]] || set -- "$@" -U "$uuid"
    mkfs -t "$fs_type" "$@" -L "$label" "$device"
    mkdir -p "$root"
    mount "$device" "$root"
}

# The end: KIND is 'table' where dib-block-device made the loop device LOOP.
detach() {
    local root=$1 kind=$2 loop=$3 mapping
    sync
    fstrim "$root" || true
    umount "$root"
    for mapping in /dev/mapper/"${loop#/dev/}"p*; do
        [[ ! -e $mapping ]] || dmsetup remove "${mapping##*/}"
    done
    if [[ $kind == table ]]; then
        dib-block-device --phase=umount --build-dir=/dib/build
        dib-block-device --phase=cleanup --build-dir=/dib/build
    else
        losetup --detach "$loop"
    fi
}

step=$1
shift
"$step" "$@"
