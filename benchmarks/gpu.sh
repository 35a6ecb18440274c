#!/usr/bin/env bash
# What only a GPU can tell, in parts of minutes and without a network; each part leaves JSON in the folder that OUT names.
#   bash benchmarks/gpu.sh check                       operations, precisions and a discriminator on this GPU against the CPU
#   bash benchmarks/gpu.sh kernels                     Triton's search and loss: exactness, races, times, memory
#   bash benchmarks/gpu.sh peers                       the same operations beside other libraries', and their peak memory
#   bash benchmarks/gpu.sh step                        a whole training step beside SimVQ's structure; NSVQ's beside SimVQ's
#   bash benchmarks/gpu.sh train METHOD [key=value …]  vq, simvq, nsvq or simvq_nsvq: 65,536 codes of width 128, 128 px, 2,100 steps
#   bash benchmarks/gpu.sh all
# DATA is a folder of photos with train/ and val/ (.gpu/photos128 if unset); wheels in .gpu/wheels are installed first.
set -euo pipefail
cd "$(dirname "$0")/.."

setup() {
  : "${OUT:?set OUT to the folder for the results}" "${DATA:=.gpu/photos128}"
  mkdir -p "$OUT"
  if compgen -G ".gpu/wheels/*.whl" > /dev/null; then python -m pip install -q --no-index --no-deps .gpu/wheels/*.whl; fi
  python -P -c "import vqzoo, vqzoo_plugins" 2> /dev/null || python -m pip install -q --no-index --no-deps --no-build-isolation -e .
}

check() {
  setup
  python benchmarks/gpu_check.py "$OUT/check.json"
}

kernels() {
  setup
  python benchmarks/gpu_kernels.py "$OUT/kernels.json"
}

peers() {
  setup
  for part in search loss memory; do python benchmarks/kernels.py "$part" --device cuda --json "$OUT/peers.jsonl"; done
}

step() {
  setup
  python benchmarks/step.py structure --gan --json "$OUT/step.jsonl" "$@"
  python benchmarks/step.py nsvq --gan --json "$OUT/step.jsonl" "$@"
}

train() {
  local method=$1 run
  shift
  setup
  run=$(mktemp -d)/run
  python -m vqzoo run "benchmarks/gpu/$method.yaml" "data.root=$DATA" "$@" --out "$run"
  cp "$run/metrics.json" "$OUT/$method.json"
  cp "$run/reconstructions.png" "$OUT/$method.png"
  # how fast an evaluation is: the features of an untrained ResNet-50 cost what those of a trained one do
  python -m vqzoo eval "$run" --data "$DATA/val" "metrics=[psnr,ssim,usage,fd]" fd.name=resnet50 fd.pretrained=false \
    --batch-size 64 --json "$OUT/${method}_eval.json"
}

case "${1:-}" in
  check | kernels | peers) "$1" ;;
  step) step "${@:2}" ;;
  train) train "${@:2}" ;;
  all)
    for part in check kernels peers step; do "$part"; done
    for method in vq simvq nsvq simvq_nsvq; do train "$method"; done
    ;;
  *)
    sed -n '2,9p' "$0"
    exit 2
    ;;
esac
