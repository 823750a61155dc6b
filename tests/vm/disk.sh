#!/usr/bin/env bash
# A block device as the cache: /dev/vda, and a loop device; blank, and with something on it.
# shellcheck source=tests/vm/lib.sh
source lib.sh

readonly MIB=$((1 << 20))
attach() { blkferry attach "$SOURCE" "$1" --name web --frontend ublk --hydrate off "${@:2}" >/dev/null; }
nothing_is_left() { [[ ! -e /var/lib/blkferry/dev-${1##*/}.ferry && ! -e /dev/ublkb0 && ! -e /run/blkferry/web.json ]] || fail "left behind"; }
# expect: the source, but for what is written at 3 MiB
expect() {
    cp source.raw expected.raw
    repeat ferry $((12 << 10)) | dd of=expected.raw bs=4k seek=$((3 * MIB >> 12)) conv=notrunc iflag=fullblock status=none
}
# finish DISK: it becomes the image that is expected
finish() {
    blkferry set web hydrate=auto
    blkferry status web --watch >/dev/null 2>&1
    cmp expected.raw /dev/ublkb0
    blkferry detach web >/dev/null
    echo 3 >/proc/sys/vm/drop_caches
    cmp -n $((32 * MIB)) expected.raw "$1" || fail "$1 is not the image"
}

make_source 32
expect
truncate -s 40M back.raw
loop=$(losetup -f --show back.raw)
for disk in /dev/vda "$loop"; do
    metadata=/var/lib/blkferry/dev-${disk##*/}.ferry
    # Blank.
    attach "$disk"
    [[ -e $metadata ]] || fail "no metadata at $metadata"
    if mount "$disk" /mnt 2>/dev/null; then fail "$disk can be mounted below its device"; fi
    cmp -n $((2 * MIB)) -i $((8 * MIB)) source.raw /dev/ublkb0
    dd if=expected.raw of=/dev/ublkb0 bs=4k skip=$((3 * MIB >> 12)) seek=$((3 * MIB >> 12)) count=3 conv=fsync status=none
    kill -9 "$(status_of web .pid)"
    blkferry recover web >/dev/null
    [[ $(status_of web .blocks.absent) -gt 1000 ]] || fail "too much is here"
    finish "$disk"
    rm "$metadata"

    # Something is on it: at the start, at the end, a file system, a partition table.
    for contents in start end ext4 partitions; do
        wipefs -qa "$disk"
        blkdiscard -z "$disk"
        case $contents in
            start) echo x | dd of="$disk" bs=512 seek=9 conv=sync status=none ;;
            end) echo x | dd of="$disk" bs=512 seek=$(($(blockdev --getsz "$disk") - 1)) conv=sync status=none ;;
            ext4) mkfs.ext4 -q "$disk" ;;
            partitions) echo ',,L' | sfdisk -q "$disk" >/dev/null 2>&1 ;;
        esac
        before=$(sha256sum <"$disk")
        refuses "--overwrite" attach "$disk"
        [[ $(sha256sum <"$disk") == "$before" ]] || fail "a refused attach has changed $disk ($contents)"
        nothing_is_left "$disk"
    done

    # Mounted, and too small.
    wipefs -qa "$disk"
    mkfs.ext4 -q -F "$disk"
    mount "$disk" /mnt
    refuses "busy" attach "$disk" --overwrite
    umount /mnt
    nothing_is_left "$disk"

    # Old contents everywhere, and meant so: they do not show, neither in blocks that are not here yet nor in
    # what is a hole at the source.
    dd if=/dev/urandom of="$disk" bs=1M count=40 iflag=fullblock status=none
    attach "$disk" --overwrite
    cmp -n $MIB -i $((20 * MIB)) source.raw /dev/ublkb0
    dd if=expected.raw of=/dev/ublkb0 bs=4k skip=$((3 * MIB >> 12)) seek=$((3 * MIB >> 12)) count=3 conv=fsync status=none
    blkdiscard -o $((5 * MIB)) -l $MIB /dev/ublkb0
    fallocate -p -o $((5 * MIB)) -l $MIB expected.raw
    finish "$disk"
    expect
    rm "$metadata"
done
truncate -s 31M back.raw
losetup -c "$loop"
refuses "too small" attach "$loop" --overwrite
nothing_is_left "$loop"
losetup -d "$loop"

# Sectors of 4 KiB below a disk that does not end on one: its last block is short, and a hole at the source.
complete() { [[ $(status_of web .state) == complete ]]; }
stop_source
truncate -s $((32 * MIB + 512)) source.raw
export_source
truncate -s 40M back.raw
loop=$(losetup -f --show --sector-size 4096 back.raw)
blkferry attach "$SOURCE" "$loop" --name web --frontend nbd --overwrite >/dev/null
wait_for 60 complete
blkferry detach web >/dev/null
echo 3 >/proc/sys/vm/drop_caches
cmp -n $((32 * MIB + 512)) source.raw "$loop"
losetup -d "$loop"
