#!/usr/bin/env bash
# Installs what a fresh Debian 12 lacks, by name, and nothing that is there already.
#   prepare.sh build    what it takes to compile
#   prepare.sh all      that, and what demo, tests and benchmarks use
set -euo pipefail

command -v cargo >/dev/null || { echo "prepare: Rust is missing; install it with rustup (https://rustup.rs) first" >&2; exit 1; }

updated=
want() { # want PACKAGE PROOF: a command, or a file, that shows it is there
  if command -v "$2" >/dev/null || compgen -G "$2" >/dev/null; then return; fi
  [ "$(id -u)" = 0 ] || { echo "prepare: package $1 is missing; install it, or run this as root" >&2; exit 1; }
  if [ -z "$updated" ]; then apt-get update -qq; updated=1; fi
  echo "prepare: installing $1"
  # One by one: a package of another release that is installed already must not keep all others out.
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$1" >/dev/null
}

want gcc cc
want g++ c++
want make make
want libclang-dev '/usr/lib/llvm-*/lib/clang/*/include/stdbool.h'
want libclang-dev '/usr/lib/llvm-*/lib/libclang*.so*'
[ "${1:-all}" = all ] || exit 0
want fio fio
want xfsprogs mkfs.xfs
want e2fsprogs mke2fs
want qemu-utils qemu-img
want util-linux losetup
want fuse3 fusermount3
want procps pgrep
want iproute2 ip
want nftables nft
want attr setfattr
want jq jq

# Licences and sources of dependencies are checked with cargo-deny, kept beside the target directory.
tools=${MORTAR_TOOLS:-$HOME/.cache/mortar/tools}
[ -x "$tools/bin/cargo-deny" ] || cargo install -q cargo-deny --version '^0.20' --locked --root "$tools"
