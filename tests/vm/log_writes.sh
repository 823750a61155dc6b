#!/usr/bin/env bash
# log_writes.sh record KIND, then log_writes.sh check KIND in another machine with the same disks (KIND: ext4, xfs):
# the power may be cut at any moment, and nothing that was promised is lost.
#
# The cache and its metadata are files on a file system, and below that dm-log-writes records every write, flush and
# FUA. On the ferried disk another file system is made; files are written into it, changed, replaced and removed, and
# synced. When a sync has returned, a mark goes into the log, and what all files hold is noted.
#
# In the other machine the boot id is another one, and there are no live maps. It makes the disk below as it was at a
# flush, a FUA write or a mark, or that and a part of the writes that were under way then, torn at sectors. Each time
# the cache's file system is mounted, and the cache attached again with nothing more said than the first time. Then
# - the part of the disk that the guest never wrote to is what the source has, fetched before the cut or not
# - the guest's file system can be mounted, which replays its journal, and is clean for e2fsck or xfs_repair
# - every file is as it was when the last sync before the cut returned, but for the one that was being changed
# - no file that was removed before that is there again.
#
# POINTS of the points in the log are looked at, every other one with what was under way; or `all`, and each both ways.
# SEED picks them, and where writes are torn.
[[ ${POINTS:-} != all ]] || HANGS_AFTER=infinity
# shellcheck source=tests/vm/lib.sh
source lib.sh

readonly KIND=$2 STEPS=${STEPS:-12} POINTS=${POINTS:-16} SEED=${SEED:-$RANDOM}
readonly KIB=1024 MIB=$((1 << 20))
# The guest's file system and, behind it, what the guest never writes to. At the very end mkfs.xfs does.
readonly GUEST_MIB=48 TAIL_MIB=4 END_MIB=1
# ext4 writes its superblock of 1 KiB over the old one when it is unmounted, and does not mount after a tear in it, on
# any disk. All else is to bear sectors.
declare -rA ATOM_BYTES=([ext4]=1024 [xfs]=512)
readonly WORKERS=2

# make_file_system DEVICE: on its first GUEST_MIB, or all of it
make_file_system() {
    local size=${2:+$2M}
    case $KIND in
        ext4) mkfs.ext4 -q -F -E nodiscard "$1" ${size:+"$size"} ;;
        # That it is for tests: it takes less than 300 MiB then.
        xfs) TEST_DIR=x TEST_DEV=x QA_CHECK_FS=x mkfs.xfs -q -f -K ${size:+-d "size=$size"} "$1" ;;
    esac
}

# mount_file_system DEVICE DIRECTORY OPTION...: what gets to the disk gets there by a sync
mount_file_system() {
    local device=$1 directory=$2 options
    shift 2
    case $KIND in
        ext4) options=(-o commit=300) ;;
        # Two machines' disks are one disk at two moments.
        xfs) options=(-o nouuid) ;;
    esac
    mount -t "$KIND" -o noatime "${options[@]}" "$@" "$device" "$directory"
}

check_file_system() {
    case $KIND in
        ext4) e2fsck -fn "$1" ;;
        xfs) xfs_repair -n "$1" ;;
    esac
}

mark() { dmsetup message host 0 mark "$1"; }

# attach DIRECTORY ID
attach() {
    blkferry attach "$SOURCE" "$1/web.raw" --name web --ublk-id "$2" --frontend ublk --hydrate off >/dev/null
}

# --- The first machine ----------------------------------------------------------

# random_file NAME KIB: a file of the guest's, synced when it is there
random_file() {
    head -c $(($2 * KIB + $2)) /dev/urandom | dd of="/guest/$1" bs=1M iflag=fullblock conv=fsync status=none
}

# What the guest does, and has been promised when it returns.
change() {
    local n=$1
    case $((n % 4)) in
        1) random_file "new$n" $((n * 37 % 200 + 8)) ;;
        2)
            repeat "line of step $n" 3000 |
                dd of=/guest/log bs=3000 iflag=fullblock oflag=append conv=notrunc,fsync status=none
            ;;
        3)
            repeat "block $n" $((4 * KIB)) >block
            dd if=block of=/guest/blocks bs=4K seek=$((n % 8)) oflag=direct conv=notrunc,fdatasync status=none
            ;;
        0)
            random_file replacing 20
            mv /guest/replacing /guest/replaced
            rm -f "/guest/new$((n - 7))"
            sync /guest
            ;;
    esac
}

# note N: what the guest's files hold after a step
note() {
    (cd /guest && find . -type f -exec sha256sum {} + | sort) >"/plain/state.$1"
    cp /guest/blocks "/plain/blocks.$1"
}

record() {
    echo 0 >/proc/sys/vm/dirty_writeback_centisecs
    mkfs.ext4 -q /dev/vda
    mkdir /plain /host /guest
    mount /dev/vda /plain
    head -c $(((GUEST_MIB + TAIL_MIB + END_MIB) * MIB)) /dev/urandom >/plain/source.raw
    sync -f /plain
    export_source /plain/source.raw

    modprobe dm-log-writes
    dmsetup create host --table "0 $(blockdev --getsz /dev/vdb) log-writes /dev/vdb /dev/vdc"
    dmsetup mknodes
    make_file_system /dev/mapper/host
    mount_file_system /dev/mapper/host /host
    sync -f /host
    mark mounted
    attach /host 0
    mark attached
    make_file_system /dev/ublkb0 $GUEST_MIB
    mount_file_system /dev/ublkb0 /guest -o discard
    head -c $((32 * KIB)) /dev/zero >/guest/blocks
    touch /guest/log /guest/replaced
    sync -f /guest
    note 0
    mark 0
    for ((n = 1; n <= STEPS; n++)); do
        # Fetched blocks get there between those that the guest writes.
        dd if=/dev/ublkb0 of=/dev/null bs=64K skip=$((GUEST_MIB * 16 + n)) count=1 iflag=direct status=none
        change "$n"
        mark "$n"
        note "$n"
    done
    cp /guest/log /plain/log
    [[ $(status_of web .blocks.absent) -gt 1000 ]] || fail "it was all here at once"
    umount /guest
    blkferry detach web --incomplete >/dev/null
    umount /host
    dmsetup status host
    dmsetup remove host
    stop_source
    umount /plain
}

# --- The other machine ----------------------------------------------------------

# check_changing DIRECTORY N: what is written to after step N is as it was elsewhere
check_changing() {
    local at=$1 n=$2 pieces
    # No step after the last one.
    ((n < STEPS)) || return 0
    case $(((n + 1) % 4)) in
        2)
            pieces=$(((n + 1) / 4))
            cmp -s -n $((pieces * 3000)) /plain/log "$at/log" ||
                { echo "of the log $pieces pieces are not there"; return 1; }
            ;;
        3)
            cmp -l "/plain/blocks.$n" "$at/blocks" >"$at.differs" || true
            awk -v block=$(((n + 1) % 8)) '$1 <= block * 4096 || $1 > (block + 1) * 4096 { bad = 1 } END { exit bad }' \
                "$at.differs" || { echo "a block changed that nobody writes to"; return 1; }
            ;;
    esac
}

# check_files DIRECTORY N: as they were after step N, when the next one may have begun
check_files() {
    local at=$1 n=$2 next=$(($2 < STEPS ? $2 + 1 : $2)) said
    (cd "$at" && find . -type f -exec sha256sum {} + | sort) >"$at.state"
    # What the step does not change is there.
    said=$(comm -12 "/plain/state.$n" "/plain/state.$next" | comm -23 - "$at.state")
    [[ -z $said ]] || { echo "not as they were: $said"; return 1; }
    # Nothing is there that was not there before, and is not just coming.
    said=$(awk '{ print $2 }' "/plain/state.$n" "/plain/state.$next" | { cat; echo ./replacing; } | sort -u |
        comm -13 - <(awk '{ print $2 }' "$at.state" | sort))
    [[ -z $said ]] || { echo "removed, and there again: $said"; return 1; }
    # A file takes another's place, or does not.
    said=$(grep ' ./replaced$' "$at.state" || echo "no file")
    grep -qxF "$said" "/plain/state.$n" "/plain/state.$next" ||
        { echo "neither the old nor the new one: $said"; return 1; }
    check_changing "$at" "$n" || return 1
    comm -12 "/plain/state.$n" "/plain/state.$next" | wc -l >>"$at.checked"
}

# check_cut IMAGE WORKER MARK: a disk after a power cut, when this was the last mark
check_cut() {
    local image=$1 worker=$2 mark=$3 host=/host$2 guest=/guest$2 device=/dev/ublkb$2
    # The live map of the last one goes with it.
    rm -rf "${BLKFERRY_RUN_DIR:?}"
    mount_file_system "$image" "$host" -o loop || { echo "the cache's file system cannot be mounted"; return 1; }
    attach "$host" "$worker" || { echo "the cache cannot be attached"; return 1; }
    cmp -n $((TAIL_MIB * MIB)) -i $((GUEST_MIB * MIB)) /plain/source.raw "$device" ||
        { echo "what the guest never wrote to is something else"; return 1; }
    if [[ $mark != [a-z]* ]]; then
        mount_file_system "$device" "$guest" || { echo "the guest's file system cannot be mounted"; return 1; }
        check_files "$guest" "$mark" || return 1
        umount "$guest" || return 1
        check_file_system "$device" >"$image.fsck" 2>&1 || { cat "$image.fsck"; echo "it is not clean"; return 1; }
    fi
    blkferry detach web --incomplete >/dev/null || { echo "detach"; return 1; }
    umount "$host"
}

# at_point WORKER COUNT MARK WHAT [SEED]
at_point() {
    # A file of its own: a loop device that lingers would show what the last one held.
    local image=/tmp/cut$1-$2${5:+-torn}.raw
    cp --sparse=always "/tmp/replay$1.raw" "$image"
    [[ -z ${5:-} ]] || replay_writes /dev/vdc tear "$image" --from "$2" --seed "$5" --atom "${ATOM_BYTES[$KIND]}"
    if ! check_cut "$image" "$1" "$3"; then
        tail -n 20 "$BLKFERRY_RUN_DIR"/*.log || true
        fail "after entry $2 ($4), mark $3${5:+, torn by seed $5}"
    fi
    rm "$image"
    echo "${5:+torn}" >>"/tmp/looked$1"
}

# Each worker takes its share of the points, in their order.
work() {
    local worker=$1 number at=0 count mark what
    export BLKFERRY_RUN_DIR=/run/cut$worker
    mkdir "/host$worker" "/guest$worker"
    truncate -s "$(blockdev --getsize64 /dev/vdb)" "replay$worker.raw"
    while read -r number count mark what; do
        ((number % WORKERS == worker)) || continue
        replay_writes /dev/vdc replay "replay$worker.raw" --from "$at" --to "$count"
        at=$count
        if [[ $POINTS == all ]] || ((number / WORKERS % 2 == 0)); then at_point "$worker" "$count" "$mark" "$what"; fi
        if [[ $POINTS == all ]] || ((number / WORKERS % 2 == 1)); then
            at_point "$worker" "$count" "$mark" "$what" $((SEED + count))
        fi
    done <chosen
}

check() {
    local all points worker workers=() failed=''
    mkdir /plain
    mount /dev/vda /plain
    export_source /plain/source.raw
    # With the last mark that each of them has behind it, from the mount on.
    replay_writes /dev/vdc points | awk '$2 == "mark" { mark = $3 } mark { print $1, mark, $2 }' >all-points
    all=$(wc -l <all-points)
    points=${POINTS/#all/$all}
    # Spread over all of the log, and others with another seed.
    awk -v points="$points" -v seed="$SEED" -v all="$all" '
        BEGIN { srand(seed); at = rand() * all / points }
        NR - 1 >= int(at) { print taken++, $0; at += all / points }' all-points >chosen
    for ((worker = 0; worker < WORKERS; worker++)); do
        work $worker &
        workers+=($!)
    done
    for worker in "${workers[@]}"; do wait "$worker" || failed=yes; done
    [[ -z $failed ]] || fail "with SEED=$SEED"
    echo "$KIND: $(wc -l <chosen) of $all points; $(cat looked* | wc -l) disks," \
        "$(cat looked* | grep -c torn) of them torn; $(awk '{ sum += $1 } END { print sum }' /guest?.checked) files;" \
        "seed $SEED, $SECONDS s"
    stop_source
    umount /plain
}

"$1"
