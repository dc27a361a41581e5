#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# sandbox-disk.sh OPTION...: make a file system of /dib by mke2fs with its options, in the file on standard input.

set -eu

# The build is over: nothing may write any more, and nothing may lie over what is to be read.
kill -KILL -1 2>/dev/null || true
awk '{ print $2 }' /proc/self/mounts | LC_ALL=C sort -r | while IFS= read -r point; do
    # The kernel writes blanks and the like in octal.
    point=$(printf '%b' "${point//\\/\\0}")
    [[ $point != /dib/* ]] || umount -l "$point"
done
mke2fs "$@" -d /dib /proc/self/fd/0
exec /usr/bin/python3 -I -S /dib/guest/sandbox-restore.py /dib /proc/self/fd/0
