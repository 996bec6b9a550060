#!/usr/bin/env bash
# vLLM's decoding of a 7B shape (random weights) on one GPU, dense and under a typical plan of 50 %; in an environment
# that has vLLM and MoA. usage: serving.sh CARD [LENGTH...]     h100 writes benchmarks/results/vllm_h100.json
set -euo pipefail
card=${1:?usage: serving.sh CARD [LENGTH...]}
shift
here=$(dirname "$0")
folder=$(mktemp -d)/llama-7b
trap 'rm -rf "$(dirname "$folder")"' EXIT
python3 "$here/peers/vllm/config.py" llama-7b "$folder" --density 0.5
(($#)) || set -- 8192 16384
for length in "$@"; do
  for plan in "" "--plan $folder/plan-50.json"; do
    # shellcheck disable=SC2086 # two words or none
    python3 "$here/peers/vllm/run.py" "$folder" --length "$length" $plan --json "$here/results/vllm_$card.json"
  done
done
