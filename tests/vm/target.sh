#!/usr/bin/env bash
# The device as ublksrv's `ublk` makes it, and takes it over: with `ublk` itself if it is here, else as it
# would call its target.
# shellcheck source=tests/vm/lib.sh
source lib.sh

# ferry VERB ARGUMENT...: as `ublk VERB -t ferry` runs the target; prints the device's id
ferry() {
    { setsid ublk-ferry "$@" --eventfd 9 9>&1 >&- 2>&- <&- & } | od -An -tu8 -w8 | awk '{ print $1 - 1 }'
}
json_of() { tail -c +33 "/run/ublksrvd/$1.pid" | tr -d '\0'; }

make_source 16
ublk-ferry help -t ferry | grep -- --source >/dev/null || fail "help"
[[ $(ferry add -t ferry -f cache.raw --source "$SOURCE" -n 3 -q 2 -d 64) == 3 ]] || fail "add"
cmp source.raw /dev/ublkb3
[[ $(status_of cache '.frontend | "\(.device) \(.queues) \(.depth)"') == "/dev/ublkb3 2 64" ]] || fail "status"
[[ $(json_of 3 | jq -r '"\(.target.name) \(.dev_info.dev_id) \(.queues["1"].qid)"') == "ferry 3 1" ]] || fail "json"
[[ $(head -n 1 /run/ublksrvd/3.pid) == "$(status_of cache .pid)" ]] || fail "pid"

kill -9 "$(status_of cache .pid)"
[[ $(ferry recover -n 3) == 3 ]] || fail "recover"
cmp source.raw /dev/ublkb3
[[ $(head -n 1 /run/ublksrvd/3.pid) == "$(status_of cache .pid)" ]] || fail "pid after recovery"
blkferry detach cache --incomplete
[[ ! -e /run/ublksrvd/3.pid && ! -e /dev/ublkb3 ]] || fail "something is left"
[[ -z $(ferry add -t ferry -f /nowhere/cache.raw --source "$SOURCE") ]] || fail "it said that it was there"

command -v ublk >/dev/null || exit 0
ln -s "$(command -v ublk-ferry)" "$(dirname "$(command -v ublk)")/ublk.ferry"
ublk add -t ferry -f second.raw --source "$SOURCE" -n 4 | grep "dev id 4" || fail "ublk add"
cmp source.raw /dev/ublkb4
kill -9 "$(status_of second .pid)"
wait_for 10 eval 'ublk list | grep QUIESCED'
ublk recover -n 4
cmp source.raw /dev/ublkb4
ublk list | grep LIVE || fail "ublk list"
ublk del -n 4
# shellcheck disable=SC2016  # for eval
wait_for 10 eval '[[ $(blkferry list) == "no devices" ]]'
[[ ! -e /dev/ublkb4 ]] || fail "ublk del"
