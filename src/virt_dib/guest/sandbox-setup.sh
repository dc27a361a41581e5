#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# sandbox-setup.sh [NAMESERVER]: make the sandbox a place where the parts of elements that run outside the
# chroot find what they find on a build host. Runs once, first; the host's /etc is on /run/host-etc as long.
# Without NAMESERVER there is no network.

set -eu

nameserver=${1:-}
host=/run/host-etc
cd /dib

chmod 1777 tmp
chmod 755 build build/mnt

# What tools need of /etc, as copies that elements may change. No file that can hold a password: apt's and
# git's settings, proxies, keys. Where one is not there or may not be read, so be it.
wanted=()
for path in \
    alternatives apt/trusted.gpg apt/trusted.gpg.d ca-certificates.conf crypto-policies debian_version ethertypes gai.conf \
    host.conf ld.so.cache ld.so.conf ld.so.conf.d lsb-release magic magic.mime mime.types mke2fs.conf networks os-release \
    perl pki/ca-trust/extracted pki/rpm-gpg pki/tls/cert.pem pki/tls/certs pki/tls/openssl.cnf protocols redhat-release \
    rpc rpm services ssl/cert.pem ssl/certs ssl/openssl.cnf system-release terminfo xattr.conf "$host"/python3*; do
    path=${path#"$host"/}
    if [[ -e $host/$path || -L $host/$path ]]; then
        wanted+=("$path")
    fi
done
(cd "$host" && cp -r --parents --no-dereference --preserve=mode,timestamps "${wanted[@]}" /etc 2>/dev/null) || true

guest/trust-host.sh host-certificates.crt
guest/containers.sh

if [[ -e /usr/share/base-passwd/passwd.master ]]; then
    cp /usr/share/base-passwd/passwd.master /etc/passwd
    cp /usr/share/base-passwd/group.master /etc/group
else
    printf 'root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534::/nonexistent:/bin/false\n' >/etc/passwd
    printf 'root:x:0:\ntty:x:5:\nnogroup:x:65534:\n' >/etc/group
fi
printf 'passwd: files\ngroup: files\nshadow: files\nhosts: files dns\n' >/etc/nsswitch.conf
echo virt-dib >/etc/hostname
printf '127.0.0.1 localhost virt-dib\n::1 localhost\n' >/etc/hosts
[[ -z $nameserver ]] || echo "nameserver $nameserver" >/etc/resolv.conf
ln -s /proc/self/mounts /etc/mtab
: >/etc/fstab

# Package tools look for these even when they work on another root.
mkdir -p /etc/apt/{apt.conf.d,preferences.d,sources.list.d,trusted.gpg.d} /etc/dpkg/dpkg.cfg.d \
    /var/cache/apt/archives/partial /var/lib/apt/lists/partial /var/lib/dpkg/{info,triggers,updates} /var/lib/misc
: >/var/lib/dpkg/status
ln -s /run /var/run
ln -s /run/lock /var/lock
chmod 700 /root
chmod 1777 /run/lock

# Ours come first on the PATH. /usr is the host's; /usr/local is not.
mkdir -p /usr/local/{bin,etc,include,lib,sbin,share,src}
install -m 755 guest/sudo.sh /usr/local/bin/sudo
# What scripts of old releases expect.
cp -P programs/. /usr/local/bin/ -r
for name in chroot mount umount; do
    install -m 755 "guest/sandbox-$name.sh" "/usr/local/sbin/$name"
done

# DIB's Python modules, for every python3 of the host.
for python in /usr/lib/python3.*/ /usr/lib64/python3.*/; do
    if [[ -d $python ]]; then
        python=${python%/}
        for packages in dist-packages site-packages; do
            mkdir -p "/usr/local/lib/${python##*/}/$packages"
            echo /dib/site >"/usr/local/lib/${python##*/}/$packages/virt-dib.pth"
        done
    fi
done

# Files of the host that variables or elements name, at the same path, read-only.
if [[ -e host-files.list ]]; then
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
fi
