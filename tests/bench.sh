#!/usr/bin/env bash
# Speed of a playground's mount beside the local XFS below it, with fio, in rounds: medians, and ratios within the run.
set -euo pipefail
bin=${CARGO_TARGET_DIR:-$HOME/.cache/mortar/target}/release
export PATH="$bin:$PATH"
dir=$(mktemp -d /var/tmp/mortar-bench.XXXXXX)
trap 'mortar playground down --dir "$dir/pg" >/dev/null 2>&1 || true; rm -rf "$dir"' EXIT
mkdir -p "$dir/mnt"
mortar playground up --dir "$dir/pg" --xfs --mount "$dir/mnt"
"$(dirname "$0")/bench.py" --target mortar="$dir/mnt:$dir" --target xfs="$dir/pg/brick1" "$@"
