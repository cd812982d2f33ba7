#!/usr/bin/env bash
# Everything that wants a GPU, in about ten minutes on one H100: speed, then next_item, preference and choose on
# MovieLens-100K for two minutes each, measured on all test users. Writes JSON to the folder given.
#
#     bash finetune/gpu_suite.sh [RESULTS]
#
# MODEL (default smollm2-135m) is any name, folder or hub id; DATA a folder of `penchant prepare` (fetched otherwise).
set -euo pipefail
cd "$(dirname "$0")/.."
results=${1:-eval/results/gpu}
model=${MODEL:-smollm2-135m}
minutes=${MINUTES:-2}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-.venv/bin/python}
"$python" -c 'import torch, sys; sys.exit(0 if torch.cuda.is_available() else "gpu_suite: torch sees no CUDA device")'
data=${DATA:-}
if [[ -z $data ]]; then
  fetched=$("$python" -m penchant fetch movielens-100k | tail -n 1)
  "$python" -m penchant prepare "$fetched/interactions.csv" "$fetched/items.csv" --out "$work/data"
  data=$work/data
fi
mkdir -p "$results"
"$python" eval/speed/training.py --data "$data" --model "$model" --out "$results/speed-training.json"
"$python" eval/finetuning.py next_item --config finetune/configs/next_item-gpu.yaml --model "$model" --data "$data" \
  --work "$work/curves" --minutes "$minutes" --epochs 100 --out "$results/finetuning-next_item.json"
"$python" eval/finetuning.py preference --config finetune/configs/preference-gpu.yaml --model "$model" --data "$data" \
  --start-from "$work/curves/next_item" --untuned "$work/curves/next_item-step-0000000.npz" \
  --work "$work/curves" --minutes "$minutes" --epochs 100 --out "$results/finetuning-preference.json"
"$python" eval/finetuning.py choose --config finetune/configs/choose-gpu.yaml --model "$model" --data "$data" \
  --work "$work/curves" --minutes "$minutes" --epochs 100 --out "$results/finetuning-choose.json"
echo "$results"
