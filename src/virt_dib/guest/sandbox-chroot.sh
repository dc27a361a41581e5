#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# chroot for the sandbox, where nobody can make the device nodes that bootstrap tools leave in a new tree.
# A root without them sees those of the sandbox for as long as the command takes; the tree stays as it is.

set -eu

chroot=$(PATH=/usr/sbin:/usr/bin:/sbin:/bin type -P chroot)
root=
options=("$@")
while [[ ${#options[@]} -gt 0 ]]; do
    case ${options[0]} in
        --) root=${options[1]:-} && break ;;
        --userspec | --groups) options=("${options[@]:1}") ;;
        -*) ;;
        *) root=${options[0]} && break ;;
    esac
    options=("${options[@]:1}")
done

if [[ -z $root || ! -d $root/dev || -c $root/dev/null || $root -ef / ]]; then
    exec "$chroot" "$@"
fi
# A mount namespace of its own: nothing to undo, however the command ends.
# shellcheck disable=SC2016 # expanded by the inner shell
exec unshare --mount /bin/sh -c '/usr/bin/mount --rbind /dev "$1/dev" && shift && exec "$@"' sh "$root" "$chroot" "$@"
