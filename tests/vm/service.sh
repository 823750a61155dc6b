#!/usr/bin/env bash
# What a service manager does: starts it again, with the same words, after it was killed or stopped.
# shellcheck source=tests/vm/lib.sh
source lib.sh

make_source 16
is_up() { [[ $(blkferry list --json | jq -r '.[0].state') == @(active|complete) ]]; }
serve() {
    blkferry attach --foreground --recover --name web --frontend ublk --hydrate off -- "$SOURCE" cache.raw >serve.log 2>&1 &
    wait_for 20 is_up
}

serve
echo precious | dd of=/dev/ublkb0 bs=512 count=1 conv=sync oflag=direct status=none
dd if=/dev/ublkb0 of=/dev/null bs=1M iflag=direct status=none &
reader=$!
kill -9 "$(status_of web .pid)"
serve
wait $reader || fail "a reader saw the kill"
[[ $(head -c 8 /dev/ublkb0) == precious ]] || fail "a write is lost"
kill "$(status_of web .pid)"
wait_for 20 test ! -e /dev/ublkb0
serve
[[ $(head -c 8 /dev/ublkb0) == precious ]] || fail "a write is lost after a stop"
blkferry detach web --incomplete
