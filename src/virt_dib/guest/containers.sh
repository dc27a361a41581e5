#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# containers.sh: settings with which podman works in the guest, for elements that make their tree with it: without
# control groups and networks of its own, and with its files where there is room. What is there stays.

set -eu

[[ -d /etc/containers ]] || mkdir /etc/containers
cd /etc/containers
[[ -e policy.json ]] || echo '{"default": [{"type": "insecureAcceptAnything"}]}' >policy.json
[[ -e containers.conf ]] || cat >containers.conf <<'SETTINGS'
[containers]
cgroups = "disabled"
keyring = false
netns = "host"
utsns = "host"
default_sysctls = []
log_driver = "none"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "none"
SETTINGS
[[ -e storage.conf ]] || cat >storage.conf <<'SETTINGS'
[storage]
driver = "vfs"
graphroot = "/dib/containers"
runroot = "/run/containers"
SETTINGS

# Where crun looks, even when it is to make no group: a tmpfs is what it takes for control groups of the first version.
mountpoint -q /sys/fs/cgroup || mount -t tmpfs -o size=64k,mode=755 cgroup /sys/fs/cgroup
