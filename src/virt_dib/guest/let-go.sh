#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# let-go.sh: at the end of a build, end all processes that keep the build disk busy: what scripts have left running.
# A disk that is busy cannot be unmounted.

disk=/sysroot

# The processes that have their root, their directory, a file or a library on the disk, but this one.
found() {
    {
        find /proc/[0-9]*/{root,cwd,fd} -maxdepth 1 -type l '(' -lname "$disk" -o -lname "$disk/*" ')'
        grep --files-with-matches --no-messages " $disk/" /proc/[0-9]*/maps
    } 2>/dev/null | cut --delimiter=/ --fields=3 | sort --unique | grep --invert-match --line-regexp "$$"
}

# They may start others meanwhile, and a process that is killed is there for a moment longer.
for _ in {1..50}; do
    processes=$(found) || break
    # shellcheck disable=SC2086 # these are several
    kill -KILL $processes 2>/dev/null
    sleep 0.1
done
exit 0
