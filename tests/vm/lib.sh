# shellcheck shell=bash
# What the guests' scripts share.
set -euo pipefail
cd /tmp || exit

# shellcheck disable=SC2034  # used by those who source this
readonly SOURCE='nbd+unix:///?socket=/tmp/source.sock'

fail() {
    echo "FAIL: $*"
    for log in /run/blkferry/*.log; do
        echo "--- $log" && tail -n 20 "$log"
    done
    dmesg | tail -n 20
    exit 1
}

# wait_for SECONDS COMMAND...: until it succeeds
wait_for() {
    local tries=$(($1 * 20))
    shift
    until "$@"; do
        ((tries-- > 0)) || fail "$* never came true"
        sleep 0.05
    done
}

# make_source MIB: an image whose first half is noise, on offer
make_source() {
    truncate -s "$1M" source.raw
    head -c "$(($1 / 2))M" /dev/urandom | dd of=source.raw conv=notrunc bs=1M status=none
    export_source
}

export_source() {
    blkferry export source.raw --listen unix:/tmp/source.sock >export.log 2>&1 &
    wait_for 10 test -S /tmp/source.sock
}

# status_of NAME FIELD, as jq has it
status_of() { blkferry status "$1" --json | jq -r "$2"; }

# refuses TEXT COMMAND...: it fails, with one line that has the text in it
refuses() {
    local text=$1 said
    shift
    if said=$("$@" 2>&1 >/dev/null); then fail "$* succeeded"; fi
    [[ $said == *"$text"* ]] || fail "$* said: $said"
    [[ $(wc -l <<<"$said") -eq 1 ]] || fail "$* said more than a line: $said"
}
