#!/usr/bin/env bash
# Verified traffic of mixed sizes and depths during hydration, on one queue and on four; ranges given up and
# zeroed do not come back.
# shellcheck source=tests/vm/lib.sh
source lib.sh

make_source 128
for queues in 1 4; do
    rm -f cache.raw*
    blkferry attach "$SOURCE" cache.raw --name web --frontend ublk --queues "$queues" --depth 32 --hydrate 20M
    [[ $(status_of web .frontend.queues) == "$queues" ]] || fail "queues"
    fio --output-format=terse --filename=/dev/ublkb0 --direct=1 --ioengine=io_uring --verify=crc32c --verify_fatal=1 \
        --size=24M --group_reporting \
        --name=small --offset=0 --rw=randwrite --bsrange=512-16k --bs_unaligned=0 --iodepth=16 \
        --name=large --offset=32M --rw=randwrite --bsrange=4k-1m --iodepth=4 \
        --name=flushed --offset=64M --rw=write --bs=8k --fsync=16 --iodepth=8 >fio.log 2>&1 || { cat fio.log; fail "fio"; }
    blkdiscard -o $((97 << 20)) -l $((4 << 20)) /dev/ublkb0
    blkdiscard -z -o $((101 << 20)) -l $(((4 << 20) + 512)) /dev/ublkb0
    cmp -n $(((8 << 20) + 512)) -i $((97 << 20)):0 /dev/ublkb0 /dev/zero
    # What nobody wrote is the source's.
    cmp -n $((22 << 20)) -i $((106 << 20)) source.raw /dev/ublkb0
    blkferry set web hydrate=auto
    blkferry status web --watch >/dev/null 2>&1
    blkferry verify web 2>/dev/null
    blkferry detach web
    cmp -n $((22 << 20)) -i $((106 << 20)) source.raw cache.raw
done
