#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# host-tree.sh STEP ...: the tree goes from the appliance to the host for extra-data.d, and what has changed comes back.
#
# In the appliance, with the directories NAME in DIRECTORY, without what is mounted there, and without device nodes,
# which nobody could make on the host:
#     pack ARCHIVE DIRECTORY NAME...
#     apply ARCHIVE REMOVED DIRECTORY NAME...     remove what the file REMOVED names, then unpack what has changed
# On the host, with the archive of 'pack' on standard input:
#     unpack DIRECTORY BEFORE         makes BEFORE, which says what is where; prints the time from which on changes count
#     changes DIRECTORY BEFORE TIME OUT       makes OUT, with changes.tar and removed in it

set -eu
set -o pipefail

tar=(tar --numeric-owner --xattrs --acls --sparse)
names_from_input=(--format posix --null --no-recursion --verbatim-files-from --files-from -)

# Show the directories at a place where nothing is mounted in them.
bind() {
    local directory=$1 name
    shift
    names=("$@")
    for name; do
        mkdir -p "$view/$name"
        mount --bind "$directory/$name" "$view/$name"
    done
    trap 'cd / && umount "${names[@]/#/$view/}" && rm -rf --one-file-system "$view"' EXIT
    cd "$view"
}

pack() {
    local archive=$1
    shift
    view=$archive.d
    bind "$@"
    find . -mindepth 1 ! -type b ! -type c ! -type s -print0 |
        "${tar[@]}" --create --file "$archive" "${names_from_input[@]}"
}

apply() {
    local archive=$1 removed=$2
    shift 2
    view=$archive.d
    bind "$@"
    xargs --null --no-run-if-empty rm -rf --one-file-system -- <"$removed"
    "${tar[@]}" --xattrs-include '*' --extract --preserve-permissions --file "$archive"
    rm -f "$archive" "$removed"
}

unpack() {
    # Other attributes a user cannot set.
    "${tar[@]}" --xattrs-include 'user.*' --xattrs-include security.capability \
        --extract --preserve-permissions --directory "$1" --file -
    (cd "$1" && find . -mindepth 1 -printf '%i %p\0') >"$2"
    # Changes of files are dated by a clock with ticks of up to 10 ms.
    sleep 0.05
    date +@%s.%N
    sleep 0.05
}

changes() {
    local directory=$1 before=$2 begun=$3 out=$4
    mkdir -m 700 "$out"
    cd "$directory"
    python3 -I -S "${BASH_SOURCE[0]%/*}/host-removed.py" >"$out/removed"
    find . -mindepth 1 ! -type s \( -newerct "$begun" -printf + -o -printf - \) -printf '%i %p\0' >"$out/now"
    python3 -I -S "${BASH_SOURCE[0]%/*}/host-changed.py" "$before" "$out/now" |
        "${tar[@]}" --create --file "$out/changes.tar" "${names_from_input[@]}"
}

step=$1
shift
"$step" "$@"
