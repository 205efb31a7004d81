#!/usr/bin/env bash
# The main job, told as a story: a volume on three servers, disk images on it, a server that dies under load and comes back.
set -euo pipefail
bin=${CARGO_TARGET_DIR:-$HOME/.cache/mortar/target}/debug
export PATH="$bin:$PATH"
dir=$(mktemp -d /var/tmp/mortar-demo.XXXXXX)
mnt=$dir/mnt
say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
end() { mortar playground down --dir "$dir/pg" >/dev/null 2>&1 || true; umount -l "$mnt" 2>/dev/null || true; rm -rf "$dir"; }
trap end EXIT

say "Three servers with a brick each, a volume, a mount"
mkdir -p "$mnt"
mortar playground up --dir "$dir/pg" --xfs --mount "$mnt"
export MORTAR_SERVERS
MORTAR_SERVERS=$(cat "$dir"/pg/server*/state/address 2>/dev/null | paste -sd, || true)
[ -n "$MORTAR_SERVERS" ] || MORTAR_SERVERS=$(find "$dir/pg" -name address -exec cat {} + | sed 's/$/,/' | tr -d '\n' | sed 's/,$//')
mortar volume status vmstore

say "Disk images with qemu-img"
qemu-img create -f qcow2 "$mnt/empty.qcow2" 10G
qemu-img create -f raw "$mnt/empty.raw" 1G
mke2fs -q -t ext4 -d /usr/bin "$dir/root.ext4" 800M
qemu-img convert -f raw -O qcow2 "$dir/root.ext4" "$mnt/root.qcow2"
qemu-img convert -f raw -O raw "$dir/root.ext4" "$mnt/root.raw"
qemu-img compare -f raw -F qcow2 "$dir/root.ext4" "$mnt/root.qcow2"
qemu-img compare -f raw -F raw "$dir/root.ext4" "$mnt/root.raw"
e2fsck -fn "$mnt/root.raw" | tail -1

say "Writing and verifying, while one server is killed and comes back"
fio --name=load --filename="$mnt/load.img" --size=256m --rw=randwrite --bs=4k --iodepth=16 --ioengine=libaio --direct=1 \
  --verify=crc32c --verify_backlog=1024 --verify_fatal=1 --time_based --runtime=25 --output-format=json --output="$dir/fio.json" &
fio=$!
sleep 6
mortar playground kill 2 --dir "$dir/pg"
sleep 6
mortar volume heal vmstore info
mortar playground start 2 --dir "$dir/pg"
began=$(date +%s%N); most=0
while :; do
  info=$(mortar --json volume heal vmstore info)
  read -r regions bytes states < <(python3 -c '
import json,sys
b=json.load(sys.stdin)["bricks"]
print(sum(x["missed_regions"] for x in b), sum(x["missed_bytes"] for x in b), ",".join(x["state"] for x in b))' <<<"$info")
  [ "$bytes" -gt "$most" ] && most=$bytes && echo "missed: $regions regions, $((bytes >> 20)) MiB"
  [ "$states" = in-sync,in-sync,in-sync ] && break
  sleep 0.2
done
echo "repaired after $((($(date +%s%N) - began) / 1000000)) ms: at most $((most >> 20)) MiB were missed of $(du -sm --exclude=.mortar "$dir/pg/brick1/data" | cut -f1) MiB on the brick"
wait $fio
python3 -c '
import json,sys
j=json.load(open(sys.argv[1]))["jobs"][0]
assert j["error"] == 0, "fio found an error"
print("fio: %d writes, all verified; longest pause %.2f s" % (j["write"]["total_ios"], max(j["write"]["clat_ns"]["max"], j["read"]["clat_ns"]["max"]) / 1e9))' "$dir/fio.json"

say "The three bricks, byte by byte"
sync "$mnt/load.img"
for n in 2 3; do
  diff -r --no-dereference --exclude=.mortar "$dir/pg/brick1/data" "$dir/pg/brick$n/data" && echo "brick 1 and brick $n hold the same files"
done
ls -l "$dir/pg/brick1/data"

say "Done; taking it down"
