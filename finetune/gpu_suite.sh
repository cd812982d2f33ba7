#!/usr/bin/env bash
# Fine-tuning on a GPU, within ten minutes on one H100: next_item, preference and choose on MovieLens-100K for a minute
# and a half each, measured on all test users; TALLRec's 64 examples; and speed. Writes JSON to the folder given, and
# fails where one isn't there at the end.
#
#     bash finetune/gpu_suite.sh [RESULTS]      # paths are taken from the repository's top
#
# MODEL (default smollm2-135m) is any name, folder or hub id; DATA a folder of `penchant prepare` (fetched otherwise);
# TALLREC the folder that holds tallrec/ (left out otherwise). LIMIT=300 allows for other seconds than 600 in all.
set -euo pipefail
cd "$(dirname "$0")/.."
results=${1:-eval/results/gpu}
model=${MODEL:-smollm2-135m}
minutes=${MINUTES:-1.5}
python=${PYTHON:-python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
touch "$work/begun"
mkdir -p "$results"
# The last ten seconds are for killing what doesn't stop when asked to.
share() { echo $(((${LIMIT:-600} - 10 - SECONDS) / $1)); }  # of what is left, for one of so many parts
missing=0
measure() {
  local parts=$1 out=$results/$2 seconds status=0
  shift 2
  seconds=$(share "$parts")
  if ((seconds > 0)); then
    timeout -k 10 "$seconds" "$python" "$@" --out "$out" || status=$?
    if [[ $status == 124 || $status == 137 ]]; then echo "stopped after $seconds seconds: $*" >&2; fi
  fi
  if [[ ! $out -nt $work/begun ]]; then  # the others are worth having all the same
    echo "gpu_suite.sh: $out was not written" >&2
    missing=1
  fi
}
"$python" -c 'import torch, sys; sys.exit(0 if torch.cuda.is_available() else "gpu_suite.sh: torch sees no CUDA device")'
data=${DATA:-}
if [[ -z $data ]]; then
  fetched=$(timeout "$(share 4)" "$python" -m penchant fetch movielens-100k | tail -n 1)
  timeout "$(share 4)" "$python" -m penchant prepare "$fetched/interactions.csv" "$fetched/items.csv" --out "$work/data"
  data=$work/data
fi
# All three rank what one retriever found; preference and choose train two more, of folds, for their rivals. Encoders are
# trained on the CPU, so few epochs and folds.
curve() {
  local parts=$1 recipe=$2
  shift 2
  measure "$parts" "finetuning-$recipe.json" eval/finetuning.py "$recipe" --config "finetune/configs/$recipe-gpu.yaml" \
    --model "$model" --data "$data" --work "$work/curves" --minutes "$minutes" --epochs 100 --retriever.epochs 20 "$@"
}
begun=$work/curves/next_item-step-0000000.npz
# Parts of unlike length: the first may take half of the time, and leaves what it doesn't need to the others.
curve 2 next_item
curve 2 preference --start-from "$work/curves/next_item" --untuned "$begun" --folds 2
curve 2 choose --folds 2
if [[ -n ${TALLREC:-} ]]; then
  measure 2 tallrec-movie.json eval/tallrec.py --data-dir "$TALLREC" --model "$model" --size 64 --seeds 1 \
    --work "$work/tallrec" --max-minutes 0.5
fi
quantised=--quantised
"$python" -c 'import bitsandbytes' 2> "$work/no-bitsandbytes" || quantised=--no-quantised
measure 1 speed-training.json eval/speed/training.py --data "$data" --model "$model" "$quantised"
echo "$results"
exit "$missing"
