#!/usr/bin/env bash
# The life of a device: made, listed, used and taken away again and again; eighty at once; and who is in the
# way of its end.
# shellcheck source=tests/vm/lib.sh
source lib.sh

readonly ROUNDS=${ROUNDS:-10} MANY=80

attach() { blkferry attach "$SOURCE" "$1.raw" --frontend ublk --hydrate off "${@:2}" >/dev/null; }
nothing_is_left() {
    [[ $(blkferry list --json) == '[]' ]] || fail "list: $(blkferry list)"
    # shellcheck disable=SC2144  # there is none, or one that is told
    [[ ! -e $(echo /dev/ublk[bc][0-9]*) ]] || fail "left: $(echo /dev/ublk[bc][0-9]*)"
    [[ -z $(ls /run/blkferry/ublk) ]] || fail "names for udev are left"
    if pgrep -x blkferry | grep -vx "$source_pid"; then fail "daemons are left"; fi
}

make_source 16

for ((round = 1; round <= ROUNDS; round++)); do
    attach again --depth 8
    [[ $(blkferry list --json | jq -r '.[] | "\(.name) \(.device) \(.state)"') == "again /dev/ublkb0 active" ]] || fail "list"
    printf 'round %07d' "$round" | dd of=/dev/ublkb0 bs=512 seek=$((round * 8)) conv=sync,fsync status=none
    cmp -n 65536 -i $((12 << 20)) source.raw /dev/ublkb0
    blkferry detach again --incomplete >/dev/null
    [[ ! -e /dev/ublkb0 ]] || fail "round $round: the device is still there"
done
nothing_is_left
# One disk through all its devices.
for ((round = 1; round <= ROUNDS; round++)); do
    [[ $(dd if=again.raw bs=512 skip=$((round * 8)) count=1 status=none | head -c 13) == "$(printf 'round %07d' "$round")" ]] ||
        fail "the write of round $round is gone"
done

# More than there are bits in a word, and more than the driver lets those without privileges have.
stop_source
rm source.raw && make_source 1
for n in $(seq $MANY); do attach "many$n" --depth 2; done
[[ $(blkferry list --json | jq '[.[] | select(.state == "active")] | length') == "$MANY" ]] || fail "list"
for n in $(seq 0 $((MANY - 1))); do cmp source.raw "/dev/ublkb$n" || fail "device $n"; done
for n in $(seq $MANY); do blkferry detach "many$n" --incomplete >/dev/null; done
nothing_is_left

# Under load: refused, and nobody notices.
stop_source
rm source.raw && make_source 64
attach busy --queues 2
fio --output-format=terse --filename=/dev/ublkb0 --direct=1 --ioengine=io_uring --verify=crc32c --verify_fatal=1 \
    --name=load --size=24M --rw=randwrite --bsrange=512-64k --iodepth=16 >fio.log 2>&1 &
fio=$!
# shellcheck disable=SC2016  # for eval
wait_for 20 eval '[[ $(status_of busy .frontend.writes) -gt 0 ]]'
refuses "opened by process" blkferry detach busy --incomplete
[[ $(status_of busy .state) == active ]] || fail "a refused detach has changed something"
wait $fio || { cat fio.log; fail "fio"; }

# Against users that come and go: it ends, or it goes on; nothing in between.
while [[ -b /dev/ublkb0 ]]; do
    dd if=/dev/ublkb0 of=/dev/null bs=64k count=1 status=none iflag=direct 2>/dev/null || true
done &
users=$!
# shellcheck disable=SC2329  # for wait_for
gone() {
    if said=$(blkferry detach busy --incomplete 2>&1 >/dev/null); then return 0; fi
    [[ $said == *"in use"* && $(status_of busy .state) == active ]] || fail "detach said: $said"
    return 1
}
wait_for 20 gone
wait $users
nothing_is_left

# Mounted: refused; the file system is whole.
attach mounted
mkfs.ext4 -q -F /dev/ublkb0
mount /dev/ublkb0 /mnt
cp /usr/bin/busybox /mnt
refuses "mounted on /mnt" blkferry detach mounted --incomplete
sync -f /mnt
echo 3 >/proc/sys/vm/drop_caches
cmp /usr/bin/busybox /mnt/busybox
# An unmount ends it, though a daemon took over and another one started while it was mounted.
kill -9 "$(status_of mounted .pid)"
blkferry recover mounted
attach other
umount /mnt
e2fsck -fn /dev/ublkb0
blkferry detach mounted --incomplete
blkferry detach other --incomplete
nothing_is_left
