#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# named-files.sh make|take NAME FROM INTO: elements write files named after the image, such as NAME.kernel, where NAME
# may be a path that leads out of their working directory FROM. 'make' its directory, or 'take' the files INTO one.

set -eu
shopt -s nullglob

name=$2
cd "$3"
case $1 in
    make)
        # Where that cannot be, the element that wants it will say so.
        mkdir -p -- "$(dirname -- "$name")" 2>/dev/null || true
        ;;
    take)
        mkdir -p -- "$4"
        for file in "$name".* "$name"-*; do
            mv -- "$file" "$4/"
        done
        ;;
esac
