#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# start-job.sh JOB TOKEN: run JOB.sh in the background with an empty environment, append what it prints
# to JOB.output, then an event with its status. Prints the process that the job runs in.
#
# The job gets a pipe, not the file: '> /dev/stderr' in a script opens whatever is behind its file
# descriptor again, and would empty a file. It has a name, for bash leaves one more descriptor of a process
# substitution to all in it. A process that outlives its job may hold the pipe; then its reader lives on,
# until the next job starts.

job=/sysroot$1
token=$2

if [[ -e /sysroot/jobs/reader ]]; then
    reader=$(</sysroot/jobs/reader)
    # Long ended in most cases; its number may be another process's now.
    if [[ $(cat "/proc/$reader/comm" 2>/dev/null) == cat ]]; then
        kill "$reader" 2>/dev/null
    fi
    rm -f /sysroot/jobs/*.{output,pipe}
fi
: >"$job.output"
mkfifo "$job.pipe"

cat <"$job.pipe" >>"$job.output" 2>/dev/null &
echo "$!" >/sysroot/jobs/reader
{
    env -i /bin/bash "$job.sh"
    printf '\036%s exit %d\036' "$token" "$?"
} </dev/null >"$job.pipe" 2>&1 &
echo "$!"
