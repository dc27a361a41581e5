#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# with-hooks.sh ROOT HOOKS COMMAND...: run a command inside ROOT, with HOOKS seen read-only at /tmp/in_target.d for
# as long as it takes. Among them are the CA certificates of the host, if the build has them: nothing of them is ever
# written into ROOT.

set -eu

# Files that variables name (environment.py): a bundle of the host's certificates and those that the image has by
# now, and settings for programs that take a bundle only so. They must be readable for those who give up root.
offer_certificates() {
    local root=$1 directory=$2 inside=/tmp/in_target.d/${2##*/} store
    mkdir -p "$directory"
    {
        cat /dib/host-certificates.crt
        for store in /etc/ssl/certs/ca-certificates.crt /etc/pki/tls/certs/ca-bundle.crt \
            /etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem /etc/ssl/ca-bundle.pem /etc/ssl/cert.pem; do
            if [[ -e $root$store || -L $root$store ]]; then
                # By the image's own program: a link there leads to a place in the image.
                chroot "$root" /bin/cat "$store" 2>/dev/null && break
            fi
        done
    } >"$directory/ca-bundle.crt" || true
    echo "Acquire::https::CAInfo \"$inside/ca-bundle.crt\";" >"$directory/apt.conf"
    {
        [[ ! -f $root/etc/wgetrc ]] || cat "$root/etc/wgetrc"
        printf '\nca_certificate = %s\n' "$inside/ca-bundle.crt"
    } >"$directory/wgetrc"
    chmod 755 "$directory" "${directory%/*}"
    chmod 644 "$directory"/*
}

root=$1
hooks=$2
shift 2

if [[ -e /dib/host-certificates.crt ]]; then
    offer_certificates "$root" "$hooks/virt-dib-certificates"
fi
mkdir "$root/tmp/in_target.d"
mount --bind "$hooks" "$root/tmp/in_target.d"
mount -o remount,ro,bind "$hooks" "$root/tmp/in_target.d"

# Ctrl-C in a shell is for the shell's own jobs, and must not end what comes after it.
trap : INT QUIT
status=0
chroot "$root" "$@" || status=$?

# A process the command left behind may still have a file open there.
umount "$root/tmp/in_target.d" 2>/dev/null || umount -l "$root/tmp/in_target.d"
rmdir "$root/tmp/in_target.d"
exit "$status"
