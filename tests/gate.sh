#!/usr/bin/env bash
# The whole gate, one step after the other; ends at the first that fails. Closes with how many tests passed.
set -euo pipefail
cd "$(dirname "$0")/.."
export MORTAR_CI=${MORTAR_CI:-1}
tools=${MORTAR_TOOLS:-$HOME/.cache/mortar/tools}
log=$(mktemp); trap 'rm -f "$log"' EXIT
began=$SECONDS

step() { # step TITLE COMMAND...
  local title=$1 at=$SECONDS; shift
  printf '\n== %s\n' "$title"
  "$@"
  printf '== %s: %d s\n' "$title" $((SECONDS - at))
}
tests() { cargo test "$@" 2>&1 | tee -a "$log"; }

step "format" cargo fmt --all --check
step "clippy" cargo clippy --workspace --all-targets -- -D warnings
pure() {
  # Without its default feature the protocol has no dependency, no unsafe, no clock, thread, file or chance.
  local tree; tree=$(cargo tree -p mortar-proto --no-default-features -e normal,build --prefix none | grep -v '^mortar-proto ' || true)
  [ -z "$tree" ] || { echo "mortar-proto depends on: $tree"; return 1; }
  CLIPPY_CONF_DIR=proto/pure cargo clippy -p mortar-proto --no-default-features -- -D warnings -F unsafe-code \
    -D clippy::disallowed-types -D clippy::disallowed-methods
}
step "the pure build of proto" pure
step "programs" cargo build --workspace --bins
# Always the whole workspace, so that nothing is compiled twice with other features.
step "unit tests" tests --workspace --lib --bins
step "command lines" tests --workspace --test local --test playground --test talk --test refusals --test helper
step "what programs expect, on a local file system" tests --workspace --test scenarios
step "decoders and the state, with anything" tests --workspace --test decoders
step "simulations" tests --workspace --test sim -- --nocapture
# Bounded by steps, not by time: about 300,000 steps, less than two minutes on one core.
step "every order of events" tests --workspace --test exhaustive -- --nocapture
step "what the simulations and searches would notice" tests --workspace --features mortar-tests/leave-out \
  --test bite --test exhaustive_bites -- --nocapture
step "quorum" tests --workspace --test quorum
step "power cuts, on images of a real disk" tests --workspace --test crash -- --nocapture
step "cluster" tests --workspace --test cluster --test bricks --test integrity -- --test-threads=1 --nocapture
step "mount" tests --workspace --test mount -- --test-threads=1 --nocapture
faults() { MORTAR_SOAK_SECONDS=${MORTAR_SOAK_SECONDS:-300} tests --workspace --test soak -- --nocapture; }
step "five minutes of faults on real processes" faults
step "documentation" env RUSTDOCFLAGS="-D warnings" cargo doc --workspace --exclude mortar-tests --no-deps
deny() {
  "$tools/bin/cargo-deny" --all-features check licenses bans sources
  if "$tools/bin/cargo-deny" fetch db 2>/dev/null; then
    "$tools/bin/cargo-deny" check advisories
  else
    echo "the advisory database cannot be reached from here: advisories were not checked"
  fi
}
step "licences and sources of dependencies" deny

passed=$(awk '/^test result:/ { n += $4 } END { print n + 0 }' "$log")
failed=$(awk '/^test result:/ { n += $6 } END { print n + 0 }' "$log")
if grep -q '^SKIPPED' "$log"; then grep '^SKIPPED' "$log"; echo "a skip of something this machine should have is a failure here"; exit 1; fi
printf '\nthe gate took %d s\n%d passed, %d failed\n' $((SECONDS - began)) "$passed" "$failed"
[ "$failed" = 0 ] && [ "$passed" -gt 0 ]
