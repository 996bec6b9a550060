#!/usr/bin/env bash
# Plans for one model at one density, what they keep of the dense model, and baselines at the same density.
# usage: accuracy.sh MODEL DENSITY FOLDER [moa search OPTION...]
# Writes FOLDER/plan.json, accuracy.{json,md} and ladder.{json,md}; FOLDER/search is the run directory. Calls for several
# densities share calibration and profile if FOLDER/search is copied from the first. DEVICE and LENGTHS may be set.
set -euo pipefail
if (($# < 3)); then
  echo "usage: accuracy.sh MODEL DENSITY FOLDER [moa search OPTION...]" >&2
  exit 1
fi
model=$1 density=$2 folder=$3
shift 3
device=${DEVICE:-auto} lengths=${LENGTHS:-2048,4096,8192,16384}
mkdir -p "$folder"

moa search "$model" --dtype bfloat16 --device "$device" --density "$density" --run-dir "$folder/search" \
  --output "$folder/plan.json" "$@"
evaluate() { # NAME AGAINST TASKS
  moa eval "$model" --dtype bfloat16 --device "$device" --run-dir "$folder/search" --plan "$folder/plan.json" \
    --against "$2" --tasks "$3" --lengths "$lengths" --items 100 --decode-steps 0 --json "$folder/$1.json"
}
evaluate accuracy dense passkey,needle,multikey,perplexity,answer_perplexity,answer_kl
evaluate ladder uniform,binary-heads,per-layer,per-head passkey,needle,multikey,perplexity
