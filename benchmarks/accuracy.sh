#!/usr/bin/env bash
# Accuracy of a model under plans: a search at each density, then the whole suite under these plans, next to the dense
# model and baselines that store as much, in one table.
# usage: accuracy.sh MODEL FOLDER RESULT [DENSITY...]     DENSITY in percent; 12.5, 25, 50 and 75 without it
# FOLDER/25 and so on are the run directories, which share calibration and profile, FOLDER/25.json the plans. RESULT
# is written as .json, .md and .png. May be set: DEVICE (several with commas share the evaluation, a search takes the
# first), LENGTHS (of the suite), SHORT (those of them at which lines and JSON are asked for), ITEMS, SEARCH (options
# for moa search), MIXTURE (for all densities; each has its own by default). What is interrupted goes on where it was.
# Heat maps need the extra `report`.
set -euo pipefail
if (($# < 3)); then
  echo "usage: accuracy.sh MODEL FOLDER RESULT [DENSITY...]" >&2
  exit 1
fi
model=$1 folder=$2 result=$3
shift 3
device=${DEVICE:-auto} lengths=${LENGTHS:-2048,4096,8192,16384} short=${SHORT-2048} items=${ITEMS:-100}
(($#)) || set -- 12.5 25 50 75
for density in "$@"; do
  if [[ ! $density =~ ^[0-9]+([.][0-9]+)?$ ]] || ! awk "BEGIN { exit !($density >= 1 && $density <= 100) }"; then
    echo "accuracy.sh: expected densities in percent, 1 to 100, not $density" >&2
    exit 1
  fi
done

for length in ${short//,/ }; do
  if [[ ,$lengths, != *,$length,* ]]; then
    echo "accuracy.sh: SHORT has $length, which is not among LENGTHS, $lengths" >&2
    exit 1
  fi
done

plans=() first=$folder/$1
for density in "$@"; do
  run=$folder/$density
  if [[ ! -e $run && -e $first/profile/manifest.json ]]; then
    rm -rf "$run.copy"
    mkdir "$run.copy"
    cp -r "$first/calibrate" "$first/profile" "$run.copy"
    mv "$run.copy" "$run"
  fi
  share=$(awk "BEGIN { print $density / 100 }")
  # shellcheck disable=SC2086 # several words
  moa search "$model" --dtype bfloat16 --device "${device%%,*}" --density "$share" --run-dir "$run" \
    ${MIXTURE:+--mixture "$MIXTURE"} --output "$run.json" ${SEARCH:-}
  plans+=(--plan "$run.json")
done

tasks=passkey,needle,multikey,multivalue,tracking,perplexity,answer_perplexity,answer_kl
for length in ${short//,/ }; do
  tasks+=,lines@$length,json@$length
done
moa eval "$model" --dtype bfloat16 --device "$device" --run-dir "$first" "${plans[@]}" \
  --against dense,uniform,per-layer,binary-heads --tasks "$tasks" --lengths "$lengths" --items "$items" \
  ${MIXTURE:+--mixture "$MIXTURE"} --decode-steps 0 --json "$result.json" --heat-map "$result.png"
