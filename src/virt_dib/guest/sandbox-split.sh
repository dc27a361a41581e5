#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# sandbox-split.sh TREE MOST_FILES [KIND:POINT...]: end the build, and show each part of the finished TREE in a place
# of its own. Status 4: more than MOST_FILES files are to be taken over from a directory. The parts come in the order of
# mounting, the root first. 'fill:POINT' is to be made into a file system: part number N is at /run/parts/N.
# 'copy:POINT' is to be copied into one: it is at /dib/build/parts/N. Where a part begins, the part around it has an
# empty directory. All of it is done with mounts, so nothing is copied.

set -eu

tree=$1
most=$2
shift 2

# The build is over: nothing may write any more, and nothing may lie over what is to be read.
kill -KILL -1 2>/dev/null || true
awk '{ print $2 }' /proc/self/mounts | LC_ALL=C sort -r | while IFS= read -r point; do
    # The kernel writes blanks and the like in octal.
    point=$(printf '%b' "${point//\\/\\0}")
    [[ $point != /dib/* ]] || umount -l "$point"
done
# They would be refused in the end, and mke2fs takes hours for a directory of a million.
for directory in /dib/out /dib/named; do
    [[ -d $directory ]] || continue
    count=$(find "$directory" -mindepth 1 -printf . | head -c "$((most + 1))" | wc -c)
    ((count <= most)) || exit 4
done
[[ $# -gt 0 ]] || exit 0

rm -rf --one-file-system /dib/build/parts
mkdir -p /run/empty /run/parts /dib/build/parts
points=()
places=()
for word; do
    point=${word#*:}
    directory=$tree${point%/}
    if [[ $(realpath --canonicalize-missing "$directory") != "$directory" ]]; then
        echo "the mount point $point of the image is behind a link in the tree" >&2
        exit 1
    fi
    place=/run/parts/${#points[@]}
    [[ $word == fill:* ]] || place=/dib/build/parts/${#points[@]}
    mkdir -p "$directory" "$place"
    mount --bind "$directory" "$place"
    for number in "${!points[@]}"; do
        # The last of these is the innermost.
        [[ $point != "${points[number]%/}"/* ]] || around=${places[number]}/${point#"${points[number]%/}"/}
    done
    points+=("$point")
    places+=("$place")
    [[ $point == / ]] || mount --bind /run/empty "$around"
done
mount --bind /run/empty "$tree"
