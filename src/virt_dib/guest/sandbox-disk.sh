#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# sandbox-disk.sh DIRECTORY OFFSET_BYTES SIZE_KIB OPTION...: make a file system of DIRECTORY with these options of
# mke2fs, at a place in the file on standard input.

set -eu

directory=$1
offset_bytes=$2
size_kib=$3
shift 3
# What was there before would take space for nothing. Not every file system can do this.
fallocate --punch-hole --offset "$offset_bytes" --length "$((size_kib * 1024))" /proc/self/fd/0 2>/dev/null || true
mke2fs -F "$@" -d "$directory" /proc/self/fd/0 "${size_kib}k"
place="/proc/self/fd/0?offset=$offset_bytes"
/usr/bin/python3 -I -S /dib/guest/sandbox-restore.py "$directory" "$place"

# A build disk is thrown away.
[[ $directory != /dib ]] || exit 0

# The kernel gives large directories an index as they grow, mke2fs does not. Status 1: that has been done.
status=0
e2fsck -f -p -D "$place" >/dev/null || status=$?
[[ $status -le 1 ]]
