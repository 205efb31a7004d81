#!/usr/bin/env bash
# Speed of a Mortar mount, beside the local XFS below it and a FUSE file system that does nothing. Everything is made in one
# directory and gone at the end, also after a failure. Arguments go to 'mortar-bench run': --rounds, --seconds, --jobs, ...
set -euo pipefail
cd "$(dirname "$0")/.."
profile=${MORTAR_PROFILE:-release}
PATH=${CARGO_TARGET_DIR:-$HOME/.cache/mortar/target}/$profile:$PATH:/sbin:/usr/sbin
[ "$(id -u)" = 0 ] || { echo "bench: it mounts file systems, which needs root" >&2; exit 1; }
[ -e /dev/fuse ] || { echo "bench: /dev/fuse is missing; load the kernel module 'fuse' (modprobe fuse)" >&2; exit 1; }

base=$(mktemp -d /var/tmp/mortar-bench.XXXXXX)
play=$base/playground
mkdir "$base/xfs" "$base/null"
finish() {
  local code=$?
  trap - EXIT
  for mount in null xfs; do
    if mountpoint -q "$base/$mount"; then umount "$base/$mount" || umount -l "$base/$mount" || code=1; fi
  done
  if [ -e "$play" ]; then mortar playground down --dir "$play" >&2 || code=1; fi
  # Never below something that is still mounted there.
  if ! grep -q " $base/" /proc/self/mountinfo; then rm -rf "$base"; fi
  exit "$code"
}
trap finish EXIT
trap 'exit 130' INT TERM

truncate -s 10G "$base/xfs.img"
mkfs.xfs -q "$base/xfs.img"
mount -o loop "$base/xfs.img" "$base/xfs"
mortar-bench null "$base/null" --size $((8 << 30)) &
null=$!
for _ in $(seq 100); do
  if mountpoint -q "$base/null"; then break; fi
  kill -0 "$null" 2>/dev/null || { echo "bench: the null file system did not start" >&2; exit 1; }
  sleep 0.1
done
status=$(mortar --json playground up --dir "$play" --xfs --mount "$base/vmstore")
pids=$(jq -r '[.servers[].pid, .mount.pid] | join(",")' <<<"$status")
MORTAR_SERVERS=$(jq -r .mortar_servers <<<"$status")
export MORTAR_SERVERS

mortar-bench run --target "mortar=$base/vmstore:$pids" --target "xfs=$base/xfs" --target "null-fuse=$base/null:$null" "$@"

# Figures of a volume with a brick out are those of two copies.
mortar --json volume heal vmstore info | jq -e .nothing_to_heal >/dev/null || {
  echo "bench: a brick is not in sync, so these are not the figures of three copies:" >&2
  mortar volume heal vmstore info >&2
  exit 1
}
