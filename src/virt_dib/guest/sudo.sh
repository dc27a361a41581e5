#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# sudo for the appliance, where everything runs as root: the options elements use, and sudo's rules
# for the environment (without -E only a few variables pass; with -E exported functions do not).

set -u

keep=
home=
login=
shell=
user=root
group=
assignments=()

usage() {
    echo "sudo: $1" >&2
    exit 1
}

while [[ $# -gt 0 ]]; do
    case $1 in
        --) shift; break ;;
        --preserve-env | --preserve-env=*) keep=1 ;;
        --set-home) home=1 ;;
        --login) login=1 ;;
        --non-interactive | --validate | --reset-timestamp) ;;
        --user=*) user=${1#*=} ;;
        --group=*) group=${1#*=} ;;
        --user | --group)
            [[ $# -gt 1 ]] || usage "option '$1' needs a value"
            if [[ $1 == --user ]]; then user=$2; else group=$2; fi
            shift
            ;;
        --*) usage "unknown option '$1'" ;;
        -?*)
            letters=${1#-}
            while [[ -n $letters ]]; do
                letter=${letters:0:1}
                letters=${letters:1}
                case $letter in
                    E) keep=1 ;;
                    H) home=1 ;;
                    i) login=1 ;;
                    n | b | S | k | K | v) ;;
                    s) shell=1 ;;
                    u | g | p | C)
                        if [[ -z $letters ]]; then
                            [[ $# -gt 1 ]] || usage "option '-$letter' needs a value"
                            letters=$2
                            set -- "$1" "${@:3}"
                        fi
                        case $letter in
                            u) user=$letters ;;
                            g) group=$letters ;;
                        esac
                        letters=
                        ;;
                    *) usage "unknown option '-$letter'" ;;
                esac
            done
            ;;
        [A-Za-z_]*=*) assignments+=("$1") ;;
        *) break ;;
    esac
    shift
done
while [[ $# -gt 0 && $1 == [A-Za-z_]*=* ]]; do
    assignments+=("$1")
    shift
done

entry=$(getent passwd "${user#\#}") || usage "unknown user: $user"
IFS=: read -r user_name _ user_id user_gid _ user_home user_shell <<<"$entry"

if [[ $# -eq 0 ]]; then
    [[ -n $login || -n $shell ]] || exit 0
    set -- "${user_shell:-/bin/sh}"
elif [[ -n $login || -n $shell ]]; then
    set -- "${user_shell:-/bin/sh}" -c '"$@"' sh "$@"
fi
[[ -z $login ]] || cd "$user_home" 2>/dev/null || cd /

become=()
if [[ $user_id != 0 || -n $group ]]; then
    become=(setpriv "--reuid=$user_id" "--regid=${group:-$user_gid}" --init-groups --)
    [[ -z $group ]] || become=(setpriv "--reuid=$user_id" "--regid=$group" --clear-groups --)
fi

path=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
if [[ -n $keep && -z $login ]]; then
    while IFS= read -r name; do
        unset -f "$name"
    done < <(compgen -A function)
    unset PS4
    [[ -z $home ]] || export HOME=$user_home
    exec env ${assignments[@]+"${assignments[@]}"} ${become[@]+"${become[@]}"} "$@"
fi
passed=()
for name in TERM LANG LC_ALL DISPLAY COLUMNS LINES; do
    [[ -z ${!name+set} ]] || passed+=("$name=${!name}")
done
exec env -i "PATH=$path" "HOME=$user_home" "USER=$user_name" "LOGNAME=$user_name" "SHELL=${user_shell:-/bin/sh}" \
    "SUDO_USER=root" "SUDO_UID=0" "SUDO_GID=0" ${passed[@]+"${passed[@]}"} \
    ${assignments[@]+"${assignments[@]}"} ${become[@]+"${become[@]}"} "$@"
