#!/usr/bin/env bash
# vLLM on a GPU, in about ten minutes on one H100: items a second of our engine, of vLLM used plainly and of the
# transformers engine, for SmolLM2-135M and for random weights of about 0.4B and 1B (what they say doesn't matter here).
# Each model's JSON goes to the folder given.
#
#     pip install -e '.[vllm]' && bash eval/speed/gpu.sh [RESULTS]
#
# CPU=1 runs the same without a GPU on the smallest model and few users, to see that it runs.
set -euo pipefail
cd "$(dirname "$0")/../.."
results=${1:-eval/results/gpu}
python=${PYTHON:-python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$results"
measure() {
  # The JSON is written after each row: what is done in time stays.
  local status=0
  timeout "${MINUTES:-3}m" "$python" eval/speed/vllm_engine.py --dtype bfloat16 "$@" || status=$?
  if [[ $status == 124 ]]; then echo "stopped after ${MINUTES:-3} minutes: $*" >&2; else return "$status"; fi
}
if [[ -n ${CPU:-} ]]; then
  measure --users 2 --sample 1 --only rank,labels --out "$results/speed-vllm-cpu.json"
  exit
fi
"$python" -c 'import torch, sys; sys.exit(0 if torch.cuda.is_available() else "gpu.sh: torch sees no CUDA device")'
measure --users 512 --sample 64 --out "$results/speed-vllm-135m.json"
for size in 0.4b 1b; do
  "$python" eval/speed/random_model.py "$size" "$work/$size"
  measure --users 512 --sample 32 --only rank,labels,generate --model "$work/$size" --out "$results/speed-vllm-$size.json"
done
echo "$results"
