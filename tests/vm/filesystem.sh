#!/usr/bin/env bash
# File systems on a ferried disk: one that is made here, and one that was there before.
# shellcheck source=tests/vm/lib.sh
source lib.sh

attach() { blkferry attach "$SOURCE" cache.raw --name web --frontend ublk --hydrate off "$@"; }

make_source 192
attach
[[ $(lsblk -bdno LOG-SEC,PHY-SEC,DISC-GRAN,ROTA /dev/ublkb0 | xargs) == "512 4096 4096 0" ]] || fail "limits"
[[ $(cat /sys/block/ublkb0/queue/{write_cache,fua} | xargs) == "write back 1" ]] || fail "caches"
[[ $(status_of web .frontend.device) == /dev/ublkb0 ]] || fail "status"
[[ $(status_of web '.frontend.features | index("user_recovery_reissue")') != null ]] || fail "features"
cmp -n $((16 << 20)) source.raw /dev/ublkb0

mkfs.ext4 -q -F /dev/ublkb0
mount /dev/ublkb0 /mnt
mkdir /mnt/tree
cp -r /usr/bin/fio /usr/bin/busybox /etc /mnt/tree
refuses "mounted on /mnt" blkferry detach web --incomplete
sync
umount /mnt
mount /dev/ublkb0 /mnt
cmp /usr/bin/fio /mnt/tree/fio
diff -r /etc /mnt/tree/etc
fstrim /mnt
umount /mnt
e2fsck -fn /dev/ublkb0
blkferry list | grep -q /dev/ublkb0 || fail "list"
blkferry detach web --incomplete
[[ ! -e /dev/ublkb0 && ! -e /dev/ublkc0 ]] || fail "the device is still there"
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
umount /mnt
blkferry set web hydrate=auto
blkferry status web --watch >/dev/null 2>&1
blkferry verify web 2>/dev/null
blkferry detach web
e2fsck -fn cache.raw
