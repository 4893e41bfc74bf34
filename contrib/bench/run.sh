#!/bin/sh
# raid beside its peers, on this machine, in one run: writes contrib/bench/RESULTS.md.
#   contrib/bench/run.sh [GROUP…]     login echo box docker upload live lines latency blocked mirror queue redis doors idle restart s3
# With groups named, the table is only printed. RAID_BENCH_NOTE adds a line about the machine;
# RAID_BENCH_STOPPED is for how many seconds Redis stands still in mirror (10).
set -eu
cd "$(dirname "$0")/../.."
out=$PWD/contrib/bench/RESULTS.md
only=$(echo "$*" | tr ' ' ,)
[ -z "$only" ] || out=
RAID_BENCH=1 RAID_BENCH_BIN=$PWD/bin RAID_BENCH_OUT=$out RAID_BENCH_ONLY=$only \
	exec "${GO:-go}" test -count=1 -timeout 15m -run '^TestBench$' -v ./cmd/raid
