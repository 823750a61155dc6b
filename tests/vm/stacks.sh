#!/usr/bin/env bash
# What is put on top of a ferried disk whose blocks are still elsewhere: device mapper, LVM, a loop device. Each
# of them keeps detach off, which says who it is.
# shellcheck source=tests/vm/lib.sh
source lib.sh

attach() { blkferry attach "$SOURCE" "$1.raw" --frontend ublk --hydrate off --queues 2 >/dev/null; }

make_source 96 96
attach web
readonly SECTORS=$((96 << 11))

# The second half first: blocks are found where the table says.
dmsetup create swapped <<TABLE
0 $((SECTORS / 2)) linear /dev/ublkb0 $((SECTORS / 2))
$((SECTORS / 2)) $((SECTORS / 2)) linear /dev/ublkb0 0
TABLE
dmsetup mknodes
cmp -n $((4 << 20)) -i $((48 << 20)):0 /dev/mapper/swapped source.raw
cmp -n $((4 << 20)) -i 0:$((48 << 20)) /dev/mapper/swapped source.raw
refuses "swapped (dm-0) is on it" blkferry detach web --incomplete
fio --output-format=terse --filename=/dev/mapper/swapped --direct=1 --ioengine=io_uring --verify=crc32c \
    --verify_fatal=1 --name=mapped --offset=40M --size=16M --rw=randwrite --bsrange=4k-64k --iodepth=8 --fsync=16 \
    >fio.log 2>&1 || { cat fio.log; fail "fio on dm-linear"; }
# Killed below it: who reads through the table waits.
kill -9 "$(status_of web .pid)"
dd if=/dev/mapper/swapped of=through.raw bs=1M skip=64 count=4 iflag=direct status=none &
reader=$!
blkferry recover web >/dev/null
wait $reader || fail "a read through dm-linear, during recovery"
cmp -n $((4 << 20)) -i 0:$((16 << 20)) through.raw source.raw
dmsetup remove swapped

# LVM: the source's blocks are below a volume that is made here.
pvcreate -qqy -ff /dev/ublkb0 >/dev/null
vgcreate -qq ferried /dev/ublkb0 >/dev/null
lvcreate -qqy -Wn -Zn -L 64M -n data ferried >/dev/null
refuses "ferried-data (dm-0) is on it" blkferry detach web --incomplete
mkfs.ext4 -q -F -E nodiscard /dev/ferried/data
mount /dev/ferried/data /mnt
cp -r /usr/bin/busybox /etc /mnt
refuses "ferried-data (dm-0) is on it" blkferry detach web --incomplete
sync -f /mnt
umount /mnt
[[ $(status_of web .blocks.absent) -gt 0 ]] || fail "it was all here at once"
vgchange -qq -an ferried >/dev/null
blkferry detach web --incomplete >/dev/null

# As it is found again at the next attach.
attach web
vgchange -qq -ay ferried >/dev/null
mount -o ro /dev/ferried/data /mnt
cmp /usr/bin/busybox /mnt/busybox
diff -r /etc /mnt/etc
umount /mnt
e2fsck -fn /dev/ferried/data
vgremove -qqfy ferried >/dev/null
pvremove -qq /dev/ublkb0 >/dev/null

loop=$(losetup -f --show /dev/ublkb0)
refuses "${loop#/dev/} is on it" blkferry detach web --incomplete
cmp -n $((4 << 20)) -i $((72 << 20)) "$loop" source.raw
losetup -d "$loop"
blkferry set web hydrate=auto
blkferry status web --watch >/dev/null 2>&1
blkferry verify web 2>/dev/null
blkferry detach web
