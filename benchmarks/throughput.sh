#!/usr/bin/env bash
# Decoding of whole models (random weights) on one GPU: every throughput result of a card, one after another.
# usage: throughput.sh CARD [RESULT...]     CARD names the files: h100 writes benchmarks/results/throughput_h100*.json
# RESULT: some of main, dynamic, short, batch8 (needs more than 80 GB), gqa, ladder; all without it.
set -euo pipefail
card=${1:?usage: throughput.sh CARD [RESULT...]}
shift
folder=$(dirname "$0")/results
declare -A options=(
  [main]="--shape llama-7b --lengths 4096,8192,16384 --batch max --against dense-static"
  [dynamic]="--shape llama-7b --lengths 4096,8192,16384 --batch max --against dense-dynamic"
  [short]="--shape llama-7b --lengths 512 --batch 1 --against dense-static"
  [batch8]="--shape llama-7b --lengths 16384 --batch 8 --against dense-static"
  [gqa]="--shape llama3-8b --lengths 32768,131072 --density 0.5,0.25 --batch max --against dense-static"
  [ladder]="--shape llama-7b --lengths 4096 --ladder"
)
(($#)) || set -- main dynamic short batch8 gqa ladder
for result in "$@"; do
  if [[ ! -v options[$result] ]]; then
    echo "throughput.sh: no result is called $result; expected main, dynamic, short, batch8, gqa or ladder" >&2
    exit 1
  fi
done
for result in "$@"; do
  file=$folder/throughput_${card}_$result.json
  # shellcheck disable=SC2086 # several words each
  moa bench throughput ${options[$result]} --steps 8 --json "${file/_main/}"
done
