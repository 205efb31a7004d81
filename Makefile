# The few things people type. The target directory is outside the clone, so that RocksDB is compiled once per machine.
export CARGO_TARGET_DIR ?= $(HOME)/.cache/mortar/target

.PHONY: help build demo test bench sim bite exhaustive soak

help:            ## this list
	@sed -n 's/^\([a-z]*\):[^#]*## /\1\t/p' Makefile | expand -t 10

build:           ## the programs, into $(CARGO_TARGET_DIR)/debug
	tests/prepare.sh build && cargo build --workspace --bins

demo:            ## the main job, told as a story
	tests/prepare.sh all && cargo build --workspace --bins && tests/demo.sh

test:            ## the whole gate
	tests/prepare.sh all && tests/gate.sh

bench:           ## speed, beside the local XFS and a FUSE file system that does nothing (a release build of its own)
	tests/prepare.sh all && cargo build --release --workspace --bins && tests/bench.sh $(BENCH)

SEEDS ?= 10000
sim:             ## many simulations: make sim SEEDS=100000
	tests/prepare.sh build && MORTAR_SIM_SEEDS=$(SEEDS) cargo test -p mortar-tests --test sim -- --nocapture

bite:            ## leaves each rule of the protocol out: which seeds and searches notice? make bite SEEDS=1000
	tests/prepare.sh build && MORTAR_BITE_SEEDS=$(SEEDS) cargo test --workspace --features mortar-tests/leave-out --test bite --test exhaustive_bites -- --nocapture
	cargo test --workspace --features mortar-tests/leave-out,mortar-brickd/leave-out --test crash without_ -- --nocapture

HOURS ?= 2
soak:            ## real processes under faults for hours: make soak HOURS=2
	tests/prepare.sh all && cargo build --workspace --bins && \
	MORTAR_SOAK_GAP=$${MORTAR_SOAK_GAP:-5-60} MORTAR_SOAK_SECONDS=$$(awk 'BEGIN { print int($(HOURS) * 3600) }') \
	cargo test --workspace --test soak -- --nocapture

DEPTH ?= 1
exhaustive:      ## every order of events in a small world, further than the gate goes: make exhaustive DEPTH=2
	tests/prepare.sh build && MORTAR_EXHAUSTIVE_DEPTH=$(DEPTH) cargo test --workspace --test exhaustive -- --nocapture
