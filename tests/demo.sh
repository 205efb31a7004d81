#!/usr/bin/env bash
# The main job, told as a story: three servers, a volume, real disk images; a server dies under load and comes back.
# Everything it starts lies in one directory below /var/tmp and is gone at the end, also after a failure; MORTAR_DEMO_LOGS=DIR
# keeps the logs of a failure.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=${CARGO_TARGET_DIR:-$HOME/.cache/mortar/target}/debug:$PATH:/sbin:/usr/sbin
[ "$(id -u)" = 0 ] || { echo "demo: it mounts file systems, which needs root" >&2; exit 1; }
[ -e /dev/fuse ] || { echo "demo: /dev/fuse is missing; load the kernel module 'fuse' (modprobe fuse)" >&2; exit 1; }

base=$(mktemp -d /var/tmp/mortar-demo.XXXXXX)
play=$base/playground mnt=$base/vmstore fio_pid='' told=''
finish() {
  local code=$?
  trap - EXIT
  [ -z "$fio_pid" ] || kill "$fio_pid" 2>/dev/null || true
  if [ "$code" != 0 ]; then
    echo >&2; echo "demo: FAILED (${told:-before the start}); the ends of the logs:" >&2
    tail -n 15 "$play"/server*/log "$play"/mount.log "$base"/fio.* >&2 2>/dev/null || true
    if [ -n "${MORTAR_DEMO_LOGS:-}" ]; then
      for log in "$play"/server*/log "$play"/mount.log; do cp "$log" "$MORTAR_DEMO_LOGS/$(echo "${log#"$play"/}" | tr / -)"; done
    fi
  fi
  if [ -e "$play" ]; then mortar playground down --dir "$play" || code=1; fi
  # Never below something that is still mounted there.
  if ! grep -q " $base/" /proc/self/mountinfo; then rm -rf "$base"; fi
  exit "$code"
}
trap finish EXIT
trap 'exit 130' INT TERM

tell() { told=$*; printf '\n\033[1m%s\033[0m\n' "$*"; }
run() { printf '$ %s\n' "${*//$base\//}"; "$@"; }
now_ms() { date +%s%3N; }
seconds() { awk -v ms="$1" 'BEGIN { printf "%.1f s", ms / 1000 }'; }
heal() { mortar --json volume heal vmstore info; }

tell "1. Three servers, each with a brick on an XFS of its own, one volume, one mount"
run mortar playground up --dir "$play" --xfs --mount "$mnt" 2>/dev/null
MORTAR_SERVERS=$(mortar --json playground status --dir "$play" | jq -r .mortar_servers)
export MORTAR_SERVERS
run mortar server status
run mortar volume status vmstore
run findmnt -o SOURCE,TARGET,FSTYPE --mountpoint "$mnt"

tell "2. Empty disks for new machines"
run qemu-img create -f qcow2 "$mnt/new.qcow2" 10G
run qemu-img create -f raw "$mnt/new.raw" 10G
run qemu-img info "$mnt/new.qcow2"

folder=$(rustc --print sysroot)/lib
mib=$(($(du -sm "$folder" | cut -f1) * 5 / 4 + 64))
tell "3. A real disk image: an ext4 with $(find "$folder" -type f | wc -l) files of $folder, $mib MiB"
run mke2fs -q -t ext4 -d "$folder" "$base/real.img" "${mib}M"
tell "4. It is converted onto the volume, as qcow2 and as raw, and compared"
began=$(now_ms)
run qemu-img convert -t none -f raw -O qcow2 "$base/real.img" "$mnt/real.qcow2"
run qemu-img convert -t none -f raw -O raw "$base/real.img" "$mnt/real.raw"
echo "took $(seconds $(($(now_ms) - began)))"
run qemu-img check "$mnt/real.qcow2"
run qemu-img compare -f raw -F qcow2 "$base/real.img" "$mnt/real.qcow2"
run e2fsck -fn "$mnt/real.raw"
before=$(sha256sum <"$base/real.img") there=$(sha256sum <"$mnt/real.raw")
echo "SHA-256 of the image here  $before"
echo "SHA-256 of the image there $there"
[ "$before" = "$there" ]

tell "5. Random writes, each verified; server 2 is killed after 5 s and started again after 12 s"
fio --name=load --filename="$mnt/load.img" --size=512m --rw=randwrite --bs=4k --iodepth=16 --ioengine=libaio --direct=1 \
  --verify=crc32c --verify_state_save=0 --verify_backlog=1024 --verify_fatal=1 --time_based --runtime=20 \
  --output-format=json --output="$base/fio.json" >"$base/fio.out" 2>&1 </dev/null &
fio_pid=$!
sleep 5
run mortar playground kill 2 --dir "$play"
sleep 5
run mortar volume heal vmstore info
sleep 2
missed=$(heal)
run mortar playground start 2 --dir "$play"
began=$(now_ms) healed=''
while :; do
  # fio ends on its own; the repair is watched meanwhile.
  if [ "$(heal | jq .nothing_to_heal)" = true ]; then healed=$(($(now_ms) - began)); break; fi
  if [ $(($(now_ms) - began)) -gt 120000 ]; then echo "demo: not repaired within 120 s" >&2; run mortar volume heal vmstore info; exit 1; fi
  sleep 0.2
done
wait "$fio_pid" && status=0 || status=$?
fio_pid=''
[ "$status" = 0 ] || { echo "demo: fio ended with $status" >&2; exit 1; }
# fio writes warnings before its JSON, if it has any.
sed -i '/^{/,$!d' "$base/fio.json"
jq -e '.jobs[0].error == 0 and .jobs[0].write.total_ios > 100' "$base/fio.json" >/dev/null
jq -r '.jobs[0] | "fio: \(.write.total_ios) blocks written, \(.read.total_ios) of them read back and right, no error",
  "longest pause of any single request: \([.write.clat_ns.max, .read.clat_ns.max] | max / 1e9 * 1000 | round / 1000) s"' "$base/fio.json"
echo "$missed" | jq -r '[.bricks[] | select(.state != "in-sync")][0] |
  "while it was away, server 2 missed \(.missed_regions) regions of 1 MiB, at most \(.missed_bytes / 1048576 | round) MiB, in \(.files | length) file(s)"'
echo "all of it was repaired, under load, $(seconds "$healed") after its start"

tell "6. What the three bricks hold, byte by byte, with nothing but XFS"
run mortar volume heal vmstore info
ls -lsh "$play/brick1/data" | sed 1d
for other in 2 3; do
  run diff -r --no-dereference --exclude=.mortar "$play/brick1/data" "$play/brick$other/data"
done
echo "bricks 1, 2 and 3 are equal"
there=$(sha256sum <"$play/brick2/data/real.raw")
echo "SHA-256 of the image on brick 2's XFS $there"
[ "$before" = "$there" ]

tell "7. All of it is taken down"
run mortar playground down --dir "$play" 2>/dev/null
printf '\n\033[1mThe demo is done: no error, nothing lost, nothing left behind.\033[0m\n'
