#!/usr/bin/env bash
# power.sh cut, then power.sh check in another machine with the same disks: what was flushed is there, and what
# was given up before the flush does not come back. Caches on ext4 (/dev/vda), on XFS (/dev/vdb), and a disk
# itself (/dev/vdc).
# shellcheck source=tests/vm/lib.sh
source lib.sh

readonly KIB=1024 MIB=$((1 << 20))
readonly CACHES=(/ext4/web.raw /xfs/web.raw /dev/vdc)

# attach N CACHE
attach() {
    blkferry attach "$SOURCE" "$2" --metadata "$(metadata_of "$2")" --name "web$1" --ublk-id "$1" --frontend ublk \
        --hydrate off >/dev/null
}
metadata_of() { case $1 in /dev/*) echo /ext4/disk.ferry ;; *) echo "$1.ferry" ;; esac; }
# pattern N: what the guest writes
pattern() { repeat "written to $1" $((40 * KIB + 512)); }
# blkdiscard, blkdiscard -z: OFFSET LENGTH
readonly DISCARDED=("$((1 * MIB)) $((3 * MIB))" "$((6 * MIB)) $((4 * KIB))")
readonly ZEROED=("$((8 * MIB)) $((3 * MIB))" "$((12 * MIB + 512)) $((9 * KIB))")
readonly WRITTEN=$((14 * MIB + 1024))

cut() {
    # What gets to the disks, gets there by a flush.
    echo 0 >/proc/sys/vm/dirty_writeback_centisecs
    mkfs.ext4 -q /dev/vda
    mkfs.xfs -q /dev/vdb
    mkdir /ext4 /xfs
    mount -o commit=300 /dev/vda /ext4
    mount /dev/vdb /xfs
    add_noise /ext4/source.raw 0 24
    sync -f /ext4/source.raw
    export_source /ext4/source.raw
    for n in "${!CACHES[@]}"; do
        attach "$n" "${CACHES[n]}"
        for range in "${DISCARDED[@]}"; do blkdiscard -o "${range% *}" -l "${range#* }" "/dev/ublkb$n"; done
        for range in "${ZEROED[@]}"; do blkdiscard -z -o "${range% *}" -l "${range#* }" "/dev/ublkb$n"; done
        pattern "$n" | dd of="/dev/ublkb$n" bs=512 seek=$((WRITTEN / 512)) iflag=fullblock status=none
        sync "/dev/ublkb$n"
        [[ $(status_of "web$n" .blocks.absent) -gt 3000 ]] || fail "too much is here"
    done
    # Not flushed: these may be lost.
    for n in "${!CACHES[@]}"; do
        blkdiscard -z -o $((20 * MIB)) -l $((64 * KIB)) "/dev/ublkb$n"
    done
}

check() {
    mkdir /ext4 /xfs
    mount /dev/vda /ext4
    mount /dev/vdb /xfs
    export_source /ext4/source.raw
    for n in "${!CACHES[@]}"; do
        attach "$n" "${CACHES[n]}"
        [[ $(status_of "web$n" .blocks.dirty) -gt 1500 ]] || fail "${CACHES[n]}: what was flushed is not known any more"
        cp /ext4/source.raw expected.raw
        for range in "${DISCARDED[@]}" "${ZEROED[@]}"; do fallocate -p -o "${range% *}" -l "${range#* }" expected.raw; done
        pattern "$n" | dd of=expected.raw bs=512 seek=$((WRITTEN / 512)) conv=notrunc iflag=fullblock status=none
        # Zeros, or what was there before, and each block wholly so.
        for ((block = 20 * MIB >> 12; block < (20 * MIB >> 12) + 16; block++)); do
            cmp -s -n 4096 -i $((block << 12)):0 "/dev/ublkb$n" /dev/zero || continue
            dd if=/dev/zero of=expected.raw bs=4096 seek=$block count=1 conv=notrunc status=none
        done
        blkferry set "web$n" hydrate=auto
        blkferry status "web$n" --watch >/dev/null 2>&1
        cmp expected.raw "/dev/ublkb$n" || fail "${CACHES[n]}: the device"
        blkferry detach "web$n"
        cmp -n $((24 * MIB)) expected.raw "${CACHES[n]}" || fail "${CACHES[n]}: the image"
    done
    stop_source
    umount /ext4 /xfs
}

"$1"
