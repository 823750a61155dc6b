#!/usr/bin/env bash
# What people get wrong, and what is left when a daemon was killed for good.
# shellcheck source=tests/vm/lib.sh
source lib.sh

make_source 16
attach() { blkferry attach "$SOURCE" "$@" --hydrate off; }

attach a.raw --ublk-id 5
[[ $(status_of a .frontend.device) == /dev/ublkb5 ]] || fail "auto is not ublk, or not the id"
refuses "exists already" attach b.raw --frontend ublk --ublk-id 5
[[ ! -e b.raw && ! -e /run/blkferry/b.json ]] || fail "something was left behind"
refuses "--frontend nbd" attach b.raw --frontend ublk --socket /tmp/x
for wrong in "--queues 0" "--queues 17" "--depth 0" "--depth 1025" "--ublk-id x" "--logical-block-size 1000"; do
    # shellcheck disable=SC2086
    if attach b.raw --frontend ublk $wrong 2>/dev/null; then fail "$wrong"; fi
done
# More queues than CPUs: as many as there are.
attach c.raw --frontend ublk --queues 8 --depth 7
[[ $(status_of c '.frontend | "\(.queues) \(.depth)"') == "$(nproc) 7" ]] || fail "queues and depth"
blkferry detach c --incomplete
attach c.raw --frontend ublk --logical-block-size 4096
[[ $(blockdev --getss "$(status_of c .frontend.device)") == 4096 ]] || fail "logical block size"
blkferry detach c --incomplete

# Killed: listed, its readers wait, given up.
pid=$(status_of a .pid)
kill -9 "$pid"
# shellcheck disable=SC2016  # for eval
wait_for 10 eval '[[ $(blkferry list --json | jq -r ".[0].state") == dead ]]'
blkferry list | grep "recover a" >/dev/null || fail "list"
dd if=/dev/ublkb5 of=/dev/null bs=4k count=1 iflag=direct status=none 2>/dev/null &
reader=$!
wait_for 10 grep -q "^State:\sD" /proc/$reader/status
blkferry detach --force a
if wait $reader; then fail "a read without a daemon"; fi
wait_for 10 test ! -e /dev/ublkb5
refuses "no dead ublk device" blkferry recover a
attach a.raw --frontend ublk
kill "$(status_of a .pid)"
wait_for 10 test ! -e /dev/ublkb0
nothing_listed() { [[ $(blkferry list --json) == "[]" ]]; }
wait_for 20 nothing_listed

# A source that ends within a logical block.
stop_source
truncate -s $(((1 << 20) + 512)) source.raw
export_source source.raw
refuses "--frontend nbd" attach odd.raw --frontend ublk --logical-block-size 4096
[[ ! -e odd.raw ]] || fail "something was left behind"
[[ -z $(ls /dev/ublkc* 2>/dev/null) ]] || fail "a device is left"
attach odd.raw --frontend ublk
cmp source.raw /dev/ublkb0
blkferry detach odd --incomplete

# Devices by the dozen.
stop_source
truncate -s 1M source.raw
export_source source.raw
for n in $(seq 12); do attach "n$n.raw" --frontend ublk --depth 4 >/dev/null; done
[[ $(blkferry list --json | jq length) == 12 ]] || fail "twelve"
for n in $(seq 12); do blkferry detach "n$n" --incomplete >/dev/null; done

# No permission, no driver.
chmod 666 /dev/ublk-control
rmmod ublk_drv
refuses "modprobe ublk_drv" attach none.raw --frontend ublk
[[ ! -e none.raw ]] || fail "something was left behind"
attach none.raw
[[ $(status_of none .frontend.kind) == nbd ]] || fail "auto without a driver"
blkferry detach none --incomplete
