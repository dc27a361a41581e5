#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# image-disk.sh FILE OFFSET_BYTES SIZE_BYTES: make FILE, where dib-block-device wants its raw image, a link to
# a device of exactly SIZE_BYTES that lies at OFFSET_BYTES of the image disk.

set -eu

file=$1
name=dib-${file##*/}
name=${name%.raw}
mkdir -p "${file%/*}" /dib/build/mnt
dmsetup create "$name" --table "0 $(($3 / 512)) linear /dev/disk/guestfs/image $(($2 / 512))"
udevadm settle
ln -s "/dev/mapper/$name" "$file"
