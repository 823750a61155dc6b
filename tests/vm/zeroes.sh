#!/usr/bin/env bash
# Ranges given up or zeroed while their blocks were still at the source: what was there does not come back, not
# through a kill, not through hydration, not in the image that remains.
# shellcheck source=tests/vm/lib.sh
source lib.sh

attach() { blkferry attach "$SOURCE" cache.raw --name web --frontend ublk --queues 2 --hydrate off >/dev/null; }
kill_and_recover() {
    kill -9 "$(status_of web .pid)"
    blkferry recover web >/dev/null
}
# zero OFFSET LENGTH: as it is expected
zero() { fallocate -p -o "$1" -l "$2" expected.raw; }
# hydrate_and_compare: the device, and then what is left of it
hydrate_and_compare() {
    blkferry set web hydrate=auto
    blkferry status web --watch >/dev/null 2>&1
    cmp expected.raw /dev/ublkb0
    blkferry verify web 2>/dev/null
    blkferry detach web
    cmp expected.raw cache.raw
}

# Discarded and zeroed, each while absent: at block borders, and for zeroes within blocks too.
make_source 32 32
cp source.raw expected.raw
attach
readonly KIB=1024 MIB=$((1 << 20))
for at in $((1 * MIB)) $((9 * MIB)) $((17 * MIB)); do
    blkdiscard -o "$at" -l $((2 * MIB)) /dev/ublkb0
    blkdiscard -o $((at + 3 * MIB)) -l $((4 * KIB)) /dev/ublkb0
    blkdiscard -z -o $((at + 4 * MIB)) -l $((2 * MIB)) /dev/ublkb0
    blkdiscard -z -o $((at + 6 * MIB + 512)) -l $((5 * KIB)) /dev/ublkb0
    zero "$at" $((2 * MIB))
    zero $((at + 3 * MIB)) $((4 * KIB))
    zero $((at + 4 * MIB)) $((2 * MIB))
    zero $((at + 6 * MIB + 512)) $((5 * KIB))
    # Flushed or not, and twice over.
    case $at in $((9 * MIB))) sync /dev/ublkb0 ;; esac
    kill_and_recover
    for from in 0 $((3 * MIB)) $((4 * MIB)) $((6 * MIB)); do
        cmp -n $((8 * KIB)) -i $((at + from)) expected.raw /dev/ublkb0 || fail "at $at + $from, after a kill"
    done
done
[[ $(status_of web .blocks.absent) -gt $((16 * MIB >> 12)) ]] || fail "too much is here"
# Once more, with what came before in the metadata only.
blkferry detach web --incomplete >/dev/null
attach
hydrate_and_compare

# fstrim: a file system that was there before, full of noise where it says that nothing is.
stop_source
rm -f source.raw cache.raw*
truncate -s 64M source.raw
add_noise source.raw 0 64
mkdir tree && add_noise tree/secret 0 8 && cp /usr/bin/busybox tree
mkfs.ext4 -q -F -b 4096 -E nodiscard -d tree source.raw
mapfile -t secret < <(debugfs -R "blocks /secret" source.raw 2>/dev/null | xargs -n 1)
[[ ${#secret[@]} -gt 2000 ]] || fail "the file's blocks: ${#secret[@]}"
export_source source.raw
attach
mount /dev/ublkb0 /mnt
rm /mnt/secret
sync -f /mnt
fstrim /mnt
kill_and_recover
cmp /usr/bin/busybox /mnt/busybox
umount /mnt
e2fsck -fn /dev/ublkb0
# All of the free space, the file's included.
dumpe2fs /dev/ublkb0 2>/dev/null | awk '/^ *Free blocks: [0-9]/ { sub(/.*: /, ""); gsub(/,/, ""); for (i = 1; i <= NF; i++) print $i }' >free
awk -F- '{ n += ($2 ? $2 : $1) - $1 + 1 } END { exit n < 8000 }' free || fail "little is free: $(xargs <free)"
cp source.raw expected.raw
blkferry set web hydrate=auto
blkferry status web --watch >/dev/null 2>&1
blkferry detach web
while IFS=- read -r first last; do
    cmp -n $(((${last:-$first} - first + 1) << 12)) -i $((first << 12)):0 cache.raw /dev/zero || fail "blocks $first-$last came back"
done <free
for block in "${secret[@]:0:3}" "${secret[-1]}"; do
    cmp -n 4096 -i $((block << 12)):0 cache.raw /dev/zero || fail "block $block of the file came back"
done
