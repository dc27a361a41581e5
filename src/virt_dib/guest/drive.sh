#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# drive.sh open DEVICE POINT: mount the helper drive's first partition, or all of it where it has none. Nothing is
# written to a drive that cannot be used; then the last line says why, and the status what kind of fault it is:
# 3 no file system for it, 4 a damaged one, 5 too small.
# drive.sh close POINT: unmount it, or, where processes keep it busy, leave it as complete on the disk as if it were.

set -eu

no_file_system=3
damaged=4
too_small=5
least_kib=65536

refuse() {
    echo "$2"
    exit "$1"
}

# The partition with the lowest number, if there are partitions.
first_partition() {
    local disk=$1 found="" number lowest=""
    for path in /sys/class/block/"${disk##*/}"/*/partition; do
        [[ -e $path ]] || continue
        number=$(<"$path")
        if [[ -z $lowest || $number -lt $lowest ]]; then
            lowest=$number
            found=${path%/partition}
        fi
    done
    [[ -z $found ]] || echo "/dev/${found##*/}"
}

# Mount $1 on $2 with options $3 and look whether that worked.
try_mount() {
    local said kernel
    said=$(mount -o "$3" "$1" "$2" 2>&1) && return
    kernel=$(dmesg | tail -n 1 | sed 's/^\[[^]]*\] *//')
    [[ $kernel != *"${1##*/}"* ]] || said=$kernel
    refuse "$damaged" "its file system cannot be mounted: ${said//$'\n'/ }"
}

open() {
    local device=$1 point=$2 disk what=it type options free_kib
    udevadm settle
    disk=$(readlink -f "$device")
    device=$(first_partition "$disk")
    if [[ -n $device ]]; then
        what="its first partition"
    else
        device=$disk
    fi
    type=$(blkid -p -o value -s TYPE "$device" || true)
    case $type in
        ext2) options=ro ;;
        ext[34]) options=noload ;;
        xfs) options=norecovery ;;
        '') refuse "$no_file_system" "$what has no file system" ;;
        *) refuse "$no_file_system" "$what holds $type, not ext2, ext3, ext4 or xfs" ;;
    esac
    if [[ $type == ext* ]] && dumpe2fs -h "$device" 2>/dev/null | grep -q '^Filesystem state:.*with errors'; then
        refuse "$damaged" "its file system has errors"
    fi
    try_mount "$device" "$point" "ro,$options"
    free_kib=$(df --output=avail -k "$point" | tail -n 1)
    if [[ -L $point/home || (-e $point/home && ! -d $point/home) ]]; then
        umount "$point"
        refuse "$no_file_system" "'home' on it is not a directory"
    fi
    umount "$point"
    if [[ $free_kib -lt $least_kib ]]; then
        refuse "$too_small" "it is too small: $((free_kib / 1024)) MiB are free, at least $((least_kib / 1024)) needed"
    fi
    options=noatime
    [[ $type == xfs ]] || options+=,errors=remount-ro
    try_mount "$device" "$point" "$options"
    mkdir -p "$point/home/.cache/image-create" "$point/home/.cache/dib/lockfiles"
}

close() {
    local point=$1
    mountpoint -q "$point" || exit 0
    sync -f "$point" || true
    if ! { umount /dib/home && umount "$point"; } 2>/dev/null; then
        fsfreeze -f "$point"
    fi
}

step=$1
shift
"$step" "$@"
