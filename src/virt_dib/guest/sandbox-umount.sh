#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# umount for the sandbox: without -f, which the kernel allows its own root only, and with the device nodes that
# sandbox-mount.sh has brought along with a /dev.

set -eu

umount=$(PATH=/usr/bin:/bin type -P umount)
arguments=()
for argument; do
    case $argument in
        -f | --force) ;;
        --* | -*[aOtN]*) arguments+=("$argument") ;;
        -*f*) arguments+=("${argument//f/}") ;;
        *)
            if [[ -c $argument/null ]] && mountpoint -q "$argument/null"; then
                for node in "$argument"/{full,null,random,tty,urandom,zero}; do
                    ! mountpoint -q "$node" || "$umount" "$node"
                done
            fi
            arguments+=("$argument")
            ;;
    esac
done
exec "$umount" ${arguments[@]+"${arguments[@]}"}
