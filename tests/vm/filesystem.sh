#!/usr/bin/env bash
# File systems on a ferried disk: XFS and ext4 that are made here, and one that was there before.
# shellcheck source=tests/vm/lib.sh
source lib.sh

attach() { blkferry attach "$SOURCE" cache.raw --name web --frontend ublk --hydrate off "$@"; }

# A tree of files goes in, and is the same when it is read from the disk.
fill_and_compare() {
    mount /dev/ublkb0 /mnt
    [[ $(status_of web .blocks.absent) -gt 10000 ]] || fail "it was all here at once"
    mkdir /mnt/tree
    cp -r /usr/bin/fio /usr/bin/busybox /etc /mnt/tree
    refuses "mounted on /mnt" blkferry detach web --incomplete
    sync -f /mnt
    umount /mnt
    mount /dev/ublkb0 /mnt
    cmp /usr/bin/fio /mnt/tree/fio
    cmp /usr/bin/busybox /mnt/tree/busybox
    diff -r /etc /mnt/tree/etc
    umount /mnt
}

# The least that mkfs.xfs takes is 300 MiB.
make_source 304 64
attach
[[ $(lsblk -bdno LOG-SEC,PHY-SEC,DISC-GRAN,ROTA /dev/ublkb0 | xargs) == "512 4096 4096 0" ]] || fail "limits"
[[ $(cat /sys/block/ublkb0/queue/{write_cache,fua} | xargs) == "write back 1" ]] || fail "caches"
[[ $(status_of web .frontend.device) == /dev/ublkb0 ]] || fail "status"
[[ $(status_of web '.frontend.features | index("user_recovery_reissue")') != null ]] || fail "features"
cmp -n $((16 << 20)) source.raw /dev/ublkb0

# Without a discard of the whole disk: it stays at the source.
mkfs.xfs -q -f -K /dev/ublkb0
fill_and_compare
blkferry list | grep /dev/ublkb0 >/dev/null || fail "list"
xfs_repair -n /dev/ublkb0 >repair.log 2>&1 || { cat repair.log; fail "xfs_repair"; }
mkfs.ext4 -q -F -E nodiscard /dev/ublkb0
fill_and_compare
e2fsck -fn /dev/ublkb0
[[ $(status_of web .blocks.absent) -gt 10000 ]] || fail "it was all here at once"
blkferry detach web --incomplete
[[ ! -e /dev/ublkb0 && ! -e /dev/ublkc0 ]] || fail "the device is still there"
attach
blkferry set web hydrate=auto
blkferry status web --watch >/dev/null 2>&1
blkferry detach web
e2fsck -fn cache.raw

# The raw image that came of it is the source of the next one, mounted before anything has come.
stop_source
rm source.raw && mv cache.raw source.raw && rm cache.raw.ferry
export_source source.raw
attach --queues 2
mount /dev/ublkb0 /mnt
cmp /usr/bin/busybox /mnt/tree/busybox
[[ $(status_of web .blocks.absent) -gt 0 ]] || fail "it was all here at once"
echo new >/mnt/new
fstrim /mnt
umount /mnt
blkferry set web hydrate=auto
blkferry status web --watch >/dev/null 2>&1
blkferry verify web 2>/dev/null
blkferry detach web
e2fsck -fn cache.raw
