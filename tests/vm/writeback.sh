#!/usr/bin/env bash
# The cache's disk fails in the background, between two commits, and is well again before the next one: the kernel has
# given up what it could not write, and tells each opening of the disk once. The commit has to hear of it, whoever else
# was told before: nothing is promised, and the device stops.
# shellcheck source=tests/vm/lib.sh
source lib.sh

readonly CACHE=/dev/mapper/cache
sectors=$(blockdev --getsz /dev/vda)
readonly sectors
attach() { blkferry attach "$SOURCE" "$CACHE" --metadata /tmp/cache.ferry --name web --frontend ublk --hydrate off "$@" >/dev/null; }
# become linear|error: without a sync, which would be a warning
become() {
    local table="0 $sectors error"
    [[ $1 == error ]] || table="0 $sectors linear /dev/vda 0"
    dmsetup suspend --nolockfs --noflush cache
    dmsetup load cache --table "$table"
    dmsetup resume --nolockfs --noflush cache
}
# overwrite OPTION...: blocks that are present, dirty and committed: there is nothing to commit but the data
overwrite() { repeat "$1" $((64 << 10)) | dd of=/dev/ublkb0 bs=64k iflag=fullblock oflag="$2" conv=notrunc status=none; }

# What gets to the disk gets there by a sync.
echo 0 >/proc/sys/vm/dirty_writeback_centisecs
make_source 32
dmsetup create cache --table "0 $sectors linear /dev/vda 0"
dmsetup mknodes
for others in nobody 'a write with FUA' 'the next host'; do
    attach --overwrite
    overwrite first direct
    sync /dev/ublkb0
    [[ $(status_of web .state) == active ]] || fail "it should be well"

    become error
    overwrite second direct
    if sync "$CACHE" 2>/dev/null; then fail "the disk does not fail"; fi
    become linear
    [[ $(status_of web .state) == active ]] || fail "nobody has told the device anything yet"

    case $others in
        'a write with FUA')
            # It is told, and the commit has to be told all the same. Its own blocks are fine.
            overwrite third direct,dsync 2>/dev/null || true
            ;;
        'the next host')
            # The disk is committed before it is given away: that fails, and no later sync makes it good.
            blkferry set web export=unix:/tmp/onward.sock >/dev/null
            refuses "the source" blkferry attach "nbd+unix:///web?socket=/tmp/onward.sock" /tmp/next.raw --name next --frontend nbd
            sleep 2
            ;;
    esac
    if sync /dev/ublkb0 2>/dev/null; then fail "a flush was answered, and what it promised is gone (told before: $others)"; fi
    [[ $(status_of web .state) == failed ]] || fail "it goes on: $(status_of web .state)"
    [[ $(status_of web .failure) == *"commit failed"* ]] || fail "it does not say why: $(status_of web .failure)"
    # For good: the disk is well, and a commit would succeed now.
    if overwrite fourth direct 2>/dev/null && sync /dev/ublkb0 2>/dev/null; then fail "it has recovered in silence"; fi
    [[ $(status_of web .state) == failed ]] || fail "it has recovered in silence"
    pid=$(status_of web .pid)
    kill -9 "$pid"
    wait_for 20 test ! -e "/proc/$pid"
    blkferry detach web --force >/dev/null
    rm -f /tmp/cache.ferry
done
stop_source
