# shellcheck shell=bash
# What the scripts share. Sourced, not run: it sets the shell's options, finds
# the repository, cargo and the tools in /usr/sbin, and installs packages.
set -euo pipefail
shopt -s inherit_errexit

# shellcheck disable=SC2034  # for the scripts that source this
REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck disable=SC2034
readonly REPO PROGRAM=${0##*/}

# mke2fs, debugfs and depmod are in /usr/sbin, which is not in every user's PATH.
PATH=$PATH:/usr/sbin:/sbin
command -v cargo >/dev/null || PATH=${CARGO_HOME:-${HOME:-/root}/.cargo}/bin:$PATH

say() { echo "$PROGRAM: $*" >&2; }
die() { say "$*"; exit 1; }

need_cargo() {
    command -v cargo >/dev/null || die "cargo is missing: install a Rust toolchain, see https://rustup.rs"
    # Crates with C or assembly in them (blake3), and linking.
    command -v cc >/dev/null || need_packages gcc libc6-dev
}

missing_packages() {
    local package
    for package in "$@"; do
        [[ $(dpkg-query -W -f '${db:Status-Status} ' "$package" 2>/dev/null) == installed* ]] || echo "$package"
    done
}

# Another apt may be at work: it is waited for.
apt() { DEBIAN_FRONTEND=noninteractive apt-get -qy -o DPkg::Lock::Timeout=300 "$@" >&2; }

# Makes sure that Debian packages are there. As root it installs what is
# missing; without, it prints the command and fails. Nothing is ever removed.
need_packages() {
    local missing
    command -v dpkg-query >/dev/null || die "needs Debian or one of its children, for the packages: $*"
    mapfile -t missing < <(missing_packages "$@")
    [[ ${#missing[@]} -gt 0 ]] || return 0
    [[ $EUID -eq 0 ]] || die "missing packages; as root: apt-get update && apt-get install ${missing[*]}"
    say "installing ${missing[*]}"
    # The lists were never fetched, or name versions that are gone; or a version from elsewhere is in the way.
    apt install --no-remove --no-install-recommends "${missing[@]}" 2>/dev/null || {
        apt update
        apt install --no-remove --no-install-recommends "${missing[@]}"
    } || install_beside "${missing[@]}"
    mapfile -t missing < <(missing_packages "$@")
    [[ ${#missing[@]} -eq 0 ]] || die "installed, yet not there: ${missing[*]}"
}

# Installs packages that cannot be beside others as these are now: those come
# from elsewhere (backports), and get the version of this release instead.
install_beside() {
    local release removed
    release=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
    mapfile -t removed < <(apt_would_remove "$@")
    [[ -n $release && ${#removed[@]} -gt 0 ]] || die "apt cannot install $*: see above"
    say "in the way are versions of ${removed[*]} that are not $release's: these are replaced by $release's"
    apt install --no-remove --allow-downgrades --no-install-recommends "$@" "${removed[@]/%//$release}"
}

apt_would_remove() { apt-get -s install --no-install-recommends "$@" 2>/dev/null | awk '$1 == "Remv" { print $2 }'; }

# need_space DIRECTORY MIB: fails if the file system there has less.
need_space() {
    local free_mib
    free_mib=$(df -Pm "$1" | awk 'NR == 2 { print $4 }')
    [[ $free_mib -ge $2 ]] || die "$1 has $free_mib MiB free, $2 MiB are needed"
}
