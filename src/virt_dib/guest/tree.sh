#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# tree.sh STEP ...: what the runner does to the image's tree between the phases.
# The steps stand in the order in which a build takes them.

set -eu
set -o pipefail

# What depends on the release of DIB; the values here are those of the newest.
sys_mode=ro
new_pts=1
keep_linked_resolver=1
clean_tmp=1
clean_logs=1
if [[ -e ${BASH_SOURCE[0]%/*}/rules.sh ]]; then
    # shellcheck source=/dev/null
    source "${BASH_SOURCE[0]%/*}/rules.sh"
fi

# Mount the kernel's file systems in the tree (DIB's mount_proc_dev_sys).
mount_kernel() {
    local root=$1
    mount -t proc none "$root/proc"
    mount --bind /dev "$root/dev"
    if [[ -n $new_pts ]]; then
        mount -t devpts -o "$(findmnt --first-only /dev/pts --noheadings --output OPTIONS)" devpts "$root/dev/pts"
    else
        mount --bind /dev/pts "$root/dev/pts"
    fi
    # In a container the sandbox may have nothing but a read-only one.
    mount -o "$sys_mode" -t sysfs none "$root/sys" 2>/dev/null || mount -o ro -t sysfs none "$root/sys"
}

# Take down every mount below a directory, the deepest first (DIB's unmount_dir). Mount points named
# after the directory stay: they are the block device's.
unmount_below() {
    local root=$1 point kept
    shift
    awk '{ print $2 }' /proc/self/mounts | LC_ALL=C sort -r | while IFS= read -r point; do
        # The kernel writes blanks and the like in octal.
        point=$(printf '%b' "${point//\\/\\0}")
        [[ $point == "$root"/* ]] || continue
        for kept in "$@"; do
            [[ $kept == / || $point != "$root$kept" ]] || continue 2
        done
        umount -l "$point"
    done
}

# After root.d: is there a tree; resolv.conf of the build in place of the image's own (DIB's create_base); directories
# that scripts want.
after_root() {
    local root=$1 hooks=$2 install_type=$3
    shift 3
    if [[ -z $(find "$root" -mindepth 1 -maxdepth 1 ! -name lost+found ! -name tmp -print -quit) ]]; then
        echo "no element put a root file system in place" >&2
        exit 3
    fi
    mkdir -p "$root/etc" "$root/proc" "$root/dev" "$root/sys" "$root/tmp"
    if [[ -L $root/etc/resolv.conf || -f $root/etc/resolv.conf ]]; then
        mv "$root/etc/resolv.conf" "$root/etc/resolv.conf.ORIG"
    fi
    if [[ -e /etc/resolv.conf ]]; then
        cat /etc/resolv.conf >"$root/etc/resolv.conf"
    else
        echo nameserver 8.8.8.8 >"$root/etc/resolv.conf"
    fi
    chmod 777 "$root/etc/resolv.conf"
    cp "$root/etc/resolv.conf" "${root%/*}/resolv.conf"
    mkdir -p "$hooks/environment.d" "$@"
    # shellcheck disable=SC2016 # expanded when the phases source it
    printf 'export DIB_DEFAULT_INSTALLTYPE=${DIB_DEFAULT_INSTALLTYPE:-"%s"}\n' "$install_type" \
        >"$hooks/environment.d/11-dib-install-type.bash"
    mount_kernel "$root"
}

# After post-root.d: the tree leaves the place where the image's file systems will be mounted.
# Prints the tree's size in KiB, as du counts it.
set_aside() {
    local root=$1 built=$2
    rm -rf --one-file-system "$root/lost+found"
    sync
    unmount_below "$root"
    mv "$root" "$built"
    du -s -x -k "$built" | cut -f1 >"${built%/*}/tree-size-kib"
}

# What takes how much room in the tree, as DIB's DIB_SHOW_IMAGE_USAGE has it: all files and directories, or those of
# 10 MiB and more.
show_usage() {
    local built=$1 all=$2 title='Image size report (files > 10MiB)' shown='[0-9]{2}MiB|GiB|TiB|PiB'
    if [[ -n $all ]]; then
        title='Image size report' shown=''
    fi
    printf '%s\n' "${title//?/=}" "$title" "${title//?/=}"
    du -a -c -x "$built" | sort -nr | numfmt --to=iec-i --padding=7 --suffix=B --field=1 --from-unit=1024 |
        grep -E "$shown" || true
    printf '\n===== end image size report =====\n\n'
}

# The appliance may have another name server than the sandbox had. What an element wrote there stays.
use_resolver() {
    local root=$1
    if [[ ! -L $root/etc/resolv.conf ]] && cmp -s "${root%/*}/resolv.conf" "$root/etc/resolv.conf"; then
        cat /etc/resolv.conf >"$root/etc/resolv.conf" 2>/dev/null || echo nameserver 8.8.8.8 >"$root/etc/resolv.conf"
    fi
}

# Copy the tree, dot files at its top included, into the mounted image.
copy_tree() {
    local built=$1 root=$2
    cp -a "$built/." "$root/"
    use_resolver "$root"
    mount_kernel "$root"
}

# Unmount the file systems of the image, given in the order of mounting, so that the host can fill them.
make_way() {
    local root=$1 number
    shift
    for ((number = $#; number > 0; number--)); do
        umount "$root${!number%/}"
    done
    sync
}

# Mount the file systems again: KIND DEVICE POINT of each, in the order of mounting. What the kernel remembers of
# the devices is older than what is on them.
take_over() {
    local built=$1 root=$2 device number=0
    shift 2
    for device in /dev/disk/guestfs/image /dev/mapper/dib-* "${@}"; do
        [[ ! -b $device ]] || blockdev --flushbufs "$device"
    done
    echo 3 >/proc/sys/vm/drop_caches
    while [[ $# -gt 0 ]]; do
        mount "$2" "$root${3%/}"
        [[ $1 != copy ]] || cp -a "${built%/*}/parts/$number/." "$root$3/"
        number=$((number + 1))
        shift 3
    done
    if [[ -z $(find "$root" -mindepth 1 -maxdepth 1 ! -name lost+found -print -quit) ]]; then
        echo "the root file system is empty" >&2
        exit 1
    fi
    # dib-block-device wrote it where the tree would be copied from.
    if [[ -e $built/etc/fstab ]]; then
        mkdir -p "$root/etc"
        cp "$built/etc/fstab" "$root/etc/fstab"
    fi
    use_resolver "$root"
    mount_kernel "$root"
}

# After cleanup.d: nothing of the build stays in the image (DIB's finalise_base).
clean() {
    local root=$1
    shift
    local resolv=$root/etc/resolv.conf
    if [[ (-n $keep_linked_resolver && -L $resolv) || $(lsattr "$resolv" 2>/dev/null) == ????i* ]]; then
        rm -f "$resolv.ORIG"
    else
        rm -f "$resolv"
        if [[ -L $resolv.ORIG || -f $resolv.ORIG ]]; then
            mv "$resolv.ORIG" "$resolv"
        fi
    fi
    unmount_below "$root/tmp"
    # As with DIB, what cannot be removed or emptied (an immutable file) stays.
    if [[ -n $clean_tmp && -d $root/tmp ]]; then
        find "$root/tmp" -mindepth 1 -maxdepth 1 -exec rm -rf --one-file-system {} \; || true
    fi
    if [[ -n $clean_logs && -d $root/var/log ]]; then
        find "$root/var/log" -type f -exec truncate -s 0 {} \; || true
    fi
    if [[ -n $clean_logs && -d $root/root ]]; then
        find "$root/root" -name '*.log' -type f -delete || true
    fi
    unmount_below "$root" "$@"
}

# After that: the tree, with all its file systems, as one stream onto a disk without one. Prints its length in bytes.
# What the kernel keeps in proc, sys and dev is left out, the directories are not. The times of access in the image
# stay as they are.
archive() {
    local root=$1 device=$2
    exec 3>"$device"
    tar --create --file=- --directory="$root" --blocking-factor=128 \
        --format=posix --pax-option='exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime' \
        --xattrs --xattrs-include='*' --acls --selinux --numeric-owner --sparse --sort=name --atime-preserve=system \
        --anchored --exclude='./proc/*' --exclude='./sys/*' --exclude='./dev/*' . >&3
    # Both have the same place in the file.
    awk '$1 == "pos:" { print $2 }' "/proc/$BASHPID/fdinfo/3"
    exec 3>&-
    sync "$device"
}

# After a script that found no space: which of these directories have hardly any, or no inodes: 'blocks DIRECTORY' or
# 'inodes DIRECTORY'.
full() {
    local directory
    for directory; do
        df --output=size,avail,itotal,iavail "$directory" 2>/dev/null | tail -n 1 |
            awk -v directory="$directory" '
                $2 < 1024 || $2 < $1 / 50 { print "blocks", directory; exit }
                $3 + 0 > 0 && $4 < 16 { print "inodes", directory }'
    done
}

# After cleanup.d, where no image is wanted: take everything down.
let_go() {
    local root=$1
    unmount_below "$root"
    umount -l "$root"
}

step=$1
shift
"$step" "$@"
