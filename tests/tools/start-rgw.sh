#!/usr/bin/env bash
# A single-node Ceph RADOS Gateway in memory, without systemd and containers (Debian: radosgw ceph-mon ceph-osd).
#   start-rgw.sh DIR PORT MON_PORT
# Prints its URL when it is ready (keys test/testtest) and ends, with everything it started, when stdin closes.
set -euo pipefail
D=$1 PORT=$2 MON_PORT=$3
MEM=${RGW_MEM_BYTES:-3221225472}

pids=()
stop() { ((${#pids[@]} == 0)) || kill -KILL "${pids[@]}" 2> /dev/null || true; } # nothing in it is worth an orderly end
trap stop EXIT
trap 'exit 1' INT TERM

fail() { echo "start-rgw: $1" >&2; tail -5 "$2" >&2 || true; exit 1; }

mkdir -p "$D"/{mon,osd,log,run,rgw}
FSID=$(cat /proc/sys/kernel/random/uuid)
cat > "$D/ceph.conf" <<CONF
[global]
fsid = $FSID
mon initial members = a
mon host = v1:127.0.0.1:$MON_PORT
ms bind msgr2 = false
ms bind ipv6 = false
public addr = 127.0.0.1
cluster addr = 127.0.0.1
auth cluster required = none
auth service required = none
auth client required = none
run dir = $D/run
admin socket = $D/run/\$name.asok
pid file =
log file = $D/log/\$name.log
log to stderr = false
debug default = 0
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pgp num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon warn on pool no redundancy = false
mon pg warn min per osd = 0
mon max pg per osd = 1000
# a throw-away cluster: let map changes through at once (cuts the start from 12 s)
paxos propose interval = 0.02
paxos min wait = 0.01
mon tick interval = 1
osd tick interval = 1
[mon]
mon data = $D/mon
mon osd full ratio = .99
mon data avail crit = 1
mon data avail warn = 1
[osd]
osd data = $D/osd
osd objectstore = memstore
memstore device bytes = $MEM
osd max object name len = 256
osd max object namespace len = 64
osd op num shards = 2
osd class update on start = true
osd crush update on start = true
[client.rgw]
rgw frontends = beast endpoint=127.0.0.1:$PORT
rgw data = $D/rgw
rgw init timeout = 30
rgw enable usage log = false
rgw enable ops log = false
rgw thread pool size = 64
rgw gc obj min wait = 30
rgw multipart min part size = ${RGW_MIN_PART_BYTES:-5242880}
CONF
export CEPH_CONF="$D/ceph.conf" CEPH_ARGS=""
C=(-c "$D/ceph.conf")

{
  ceph-authtool --create-keyring "$D/keyring" --gen-key -n mon. --cap mon 'allow *'
  ceph-authtool "$D/keyring" --gen-key -n client.admin --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *'
  monmaptool --create --addv a "[v1:127.0.0.1:$MON_PORT]" --fsid "$FSID" "$D/monmap"
  ceph-mon "${C[@]}" --mkfs -i a --monmap "$D/monmap" --keyring "$D/keyring"
} > "$D/log/setup.out" 2>&1 || fail "set-up" "$D/log/setup.out"

ceph-mon "${C[@]}" -f -i a < /dev/null > "$D/log/mon.out" 2>&1 &
pids+=($!)
OSD_UUID=$(cat /proc/sys/kernel/random/uuid)
for _ in $(seq 50); do timeout 20 ceph "${C[@]}" osd new "$OSD_UUID" > /dev/null 2>&1 && break; sleep .05; done
ceph-osd "${C[@]}" -i 0 --mkfs --osd-uuid "$OSD_UUID" > "$D/log/osd-mkfs.out" 2>&1 || fail "osd" "$D/log/osd-mkfs.out"
# one start in ten the osd asks before it knows the monitor map ("wrong fsid") and ends: start it again
osd_up() {
  ceph-osd "${C[@]}" -f -i 0 < /dev/null > "$D/log/osd.out" 2>&1 &
  pids[1]=$!
  for _ in $(seq 100); do
    ceph "${C[@]}" osd stat 2> /dev/null | grep -q '1 up' && return
    kill -0 "${pids[1]}" 2> /dev/null || return 1
  done
  return 1
}
osd_up || osd_up || osd_up || fail "osd" "$D/log/osd.out"
radosgw "${C[@]}" -f -n client.rgw < /dev/null > "$D/log/rgw.out" 2>&1 &
pids+=($!)
for _ in $(seq 600); do
  (exec 3<> "/dev/tcp/127.0.0.1/$PORT") 2> /dev/null && break
  kill -0 "${pids[2]}" 2> /dev/null || fail "radosgw" "$D/log/client.rgw.log"
  sleep .05
done
radosgw-admin "${C[@]}" user create --uid=test --display-name=test --access-key=test --secret-key=testtest \
  > "$D/log/user.out" 2>&1 || fail "user create" "$D/log/user.out"

echo "http://127.0.0.1:$PORT"
cat > /dev/null
