#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# dib-run-parts DIRECTORY, for elements of DIB before 2.3.0, which call it or install it in the image. It was a
# package of its own (dib-utils); the rules are those of run-phase.sh, without events.

set -ue
set -o pipefail

directory=${1:?a directory of scripts}
[[ -d $directory ]] || { echo "dib-run-parts: no directory: $directory" >&2 && exit 1; }

names=$(cd "$directory" && find . -maxdepth 1 -xtype f -executable -printf '%f\n' |
    { grep -E "${RUN_PARTS_REGEX:-^[0-9A-Za-z_-]+$}" || true; } | LC_ALL=C sort -n)
(
    if [[ -d $directory/../environment.d ]]; then
        while IFS= read -r file <&9; do
            # shellcheck source=/dev/null
            source "$file"
        done 9< <(find "$directory/../environment.d" -maxdepth 1 -xtype f |
            { grep -E '/[0-9A-Za-z_.-]+$' || true; } | LC_ALL=C sort)
    fi
    for name in $names; do
        echo "dib-run-parts Running $directory/$name" >&2
        "$directory/$name" 9<&-
        echo "dib-run-parts $name completed" >&2
    done
)
