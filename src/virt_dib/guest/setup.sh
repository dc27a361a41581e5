#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# setup.sh: make the appliance a place where the parts of elements that run outside the chroot
# find what they find on a build host. Runs once, first, with the build disk on /sysroot.

set -eu

# supermin makes the appliance of the packages the host has at that moment; while apt works, some are half there.
missing=()
for program in bash cat chroot dmsetup find findmnt gawk getent install losetup mke2fs mount python3 sort udevadm; do
    type -P "$program" >/dev/null || missing+=("$program")
done
if [[ ${#missing[@]} -gt 0 ]]; then
    echo "the appliance lacks ${missing[*]}; were packages being installed on the host while it was made?" >&2
    exit 1
fi

mkdir -p /dib
mount --bind /sysroot /dib
cd /dib

# The host makes the build disk as an ordinary user; in the guest its files are root's. When a sandbox has made it
# everything has its owner already, the image's tree above all.
if [[ $(stat -c %u:%g guest) != 0:0 ]]; then
    chown -R -h 0:0 build elements guest home image out prefix programs site host-files jobs tmp
    [[ ! -d extra-data-cache ]] || chown -R -h 0:0 extra-data-cache
fi
# The home directory is that of the helper drive, if there is one.
! mountpoint -q /sysroot/drive || mount --bind /sysroot/drive/home home
chmod 1777 tmp
chmod 755 build
# In the disk stage alone there is none yet.
[[ ! -d build/mnt ]] || chmod 755 build/mnt

# Temporary files go to the build disk, which is as large as the build needs.
cp -a /tmp/. tmp/
mount --bind tmp /tmp
mount --bind tmp /var/tmp

# Links that packages make when they are installed, and which no package's file list holds.
[[ -e /usr/bin/awk ]] || ln -s gawk /usr/bin/awk
[[ -e /usr/bin/which || ! -e /usr/bin/which.debianutils ]] || ln -s which.debianutils /usr/bin/which
if [[ ! -e /etc/passwd ]]; then
    if [[ -e /usr/share/base-passwd/passwd.master ]]; then
        cp /usr/share/base-passwd/passwd.master /etc/passwd
        cp /usr/share/base-passwd/group.master /etc/group
    else
        printf 'root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534::/nonexistent:/bin/false\n' >/etc/passwd
        printf 'root:x:0:\ntty:x:5:\nnogroup:x:65534:\n' >/etc/group
    fi
fi
install -D -m 755 guest/sudo.sh /usr/local/bin/sudo
# What scripts of old releases expect.
cp -P programs/. /usr/local/bin/ -r

guest/trust-host.sh host-certificates.crt
guest/containers.sh

# DIB's Python modules, for every python3 of the appliance.
for packages in /usr/lib/python3/dist-packages /usr/lib/python3*/site-packages; do
    if [[ -d $packages ]]; then
        echo /dib/site >"$packages/virt-dib.pth"
    fi
done

# Without these, '> /dev/stderr' would make a file.
for link in stdin:0 stdout:1 stderr:2; do
    ln -sfn "/proc/self/fd/${link#*:}" "/dev/${link%:*}"
done
[[ -e /dev/fd ]] || ln -s /proc/self/fd /dev/fd

hostname virt-dib
printf '127.0.0.1 localhost virt-dib\n::1 localhost\n' >/etc/hosts
# As on a build host: the new instance in the chroot takes these options over.
mount -o remount,gid=5,mode=620,ptmxmode=666 /dev/pts
modprobe -a loop dm_mod

# Files of the host that variables or elements name, at the same path, read-only.
while IFS= read -r -d '' path; do
    mkdir -p "${path%/*}"
    if [[ -d host-files$path ]]; then
        mkdir -p "$path"
    else
        [[ -e $path ]] || : >"$path"
    fi
    mount --bind "host-files$path" "$path"
    mount -o remount,ro,bind "$path"
done <host-files.list
