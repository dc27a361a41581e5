#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# job.sh DIRECTORY TOKEN: run the command in DIRECTORY/command with the variables in
# DIRECTORY/environment, append what it prints to DIRECTORY/output, then an event with its status.
#
# The command gets a pipe, not the file: '> /dev/stderr' in a script opens whatever is behind its
# file descriptor again, and would empty a file.

directory=$1
token=$2

exec </dev/null
exec > >(exec /bin/cat >>"$directory/output") 2>&1
printf '%s\n' "$!" >"$directory/reader"

(
    # shellcheck disable=SC1091 # written by the host for this job
    . "$directory/environment"
    # shellcheck disable=SC1091 # sets the array 'command'
    . "$directory/command"
    # shellcheck disable=SC2154
    exec "${command[@]}"
)
status=$?

printf '\036%s exit %d\036' "$token" "$status"
