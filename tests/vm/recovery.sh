#!/usr/bin/env bash
# The daemon is killed under verified traffic, again and again; another one takes over. Nobody gets an error.
# shellcheck source=tests/vm/lib.sh
source lib.sh

readonly ROUNDS=${ROUNDS:-6}

dead() { [[ $(blkferry list --json | jq -r '.[0].state') == dead ]]; }

settings() { status_of web '[.hydrate.mode, .source.on_loss, .handoff.export] | join(" ")'; }

make_source 128
blkferry attach "$SOURCE" cache.raw --name web --frontend ublk --queues 2 --hydrate 8M
# What is set meanwhile holds for those who take over, and where it is offered to others.
blkferry set web hydrate=4M on-source-loss=fail-after:90s export=127.0.0.1:0
offered=$(status_of web .handoff.export)
wanted=$(settings)
touch running
while [[ -e running ]]; do
    fio --output-format=terse --filename=/dev/ublkb0 --direct=1 --ioengine=io_uring --verify=crc32c --verify_fatal=1 \
        --randseed=$RANDOM --size=12M \
        --name=small --offset=0 --rw=randwrite --bsrange=512-16k --iodepth=16 \
        --name=large --offset=48M --rw=randwrite --bsrange=4k-256k --fsync=32 --iodepth=4 >fio.log 2>&1 || touch fio-failed
done &
writer=$!
for ((round = 1; round <= ROUNDS; round++)); do
    sleep "0.$((RANDOM % 9 + 1))"
    kill -9 "$(status_of web .pid)"
    wait_for 10 dead
    case $round in
        1) refuses "blkferry recover web" blkferry attach "$SOURCE" cache.raw --name web --frontend ublk ;;
        2) refuses "blkferry recover web" blkferry attach "$SOURCE" cache.raw --name other --frontend ublk ;;
    esac
    blkferry recover web || fail "round $round"
    [[ ! -e fio-failed ]] || { cat fio.log; fail "fio, round $round"; }
    [[ $(settings) == "$wanted" ]] || fail "round $round: $(settings), and was set to $wanted"
    nbdinfo --size "$offered" >/dev/null || fail "round $round: it is not offered"
done
rm running
wait $writer
[[ ! -e fio-failed ]] || { cat fio.log; fail "fio"; }
refuses "is alive" blkferry recover web

# A stop while somebody has it open leaves it to the next one, too.
exec 7</dev/ublkb0
refuses "opened by process" blkferry detach web --incomplete
kill "$(status_of web .pid)"
wait_for 10 dead
# The daemon must not inherit what its caller has open.
blkferry recover web
exec 7<&-
[[ $(cat /run/blkferry/ublk/0) == web ]] || fail "the name for udev"
blkferry set web hydrate=auto
blkferry status web --watch >/dev/null 2>&1
cmp -n $((30 << 20)) -i $((16 << 20)) source.raw /dev/ublkb0
blkferry verify web 2>/dev/null
blkferry detach web
cmp -n $((30 << 20)) -i $((16 << 20)) source.raw cache.raw
