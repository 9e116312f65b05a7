#!/usr/bin/env bash
# Make the reports of fine-tuned networks in this folder: the retrained checkpoints of the zoo, tuned
# layer by layer, and then end to end as well, with three seeds, and compared with their parents in
# every way on all 10,000 test images.
#
#   model_zoo/results/finetuned.sh DATA [PATTERN]
#
# DATA has cifar10/ (train.npz and test.npz). What is there already is kept; PATTERN chooses by name.
# An interrupted tuning goes on where it was left.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
data=$(realpath --relative-to="$here" "$1")
pattern=${2:-.}
work=../../runs/results
cd "$here"
mkdir -p "$work"

tune() { # NAME DATA_SET
  [[ $1 =~ $pattern ]] || return 0
  local name=$1 set=$2 parent=../checkpoints/$1.snn.safetensors
  local all=("$parent")
  for way in layerwise both; do
    for seed in 0 1 2; do
      local stem=$name.$way-seed$seed options=(--layerwise)
      [[ $way == layerwise ]] || options+=(--end-to-end)
      [[ ! -e $work/$stem.finetune.part ]] || options+=(--resume)
      [[ -e $work/$stem.snn.safetensors ]] ||
        snnconv finetune "$parent" "${options[@]}" --data "$data/$set" --seed $seed \
          -o "$work/$stem.snn.safetensors" --quiet
      cp "$work/$stem.finetune.json" .
      all+=("$work/$stem.snn.safetensors")
    done
  done
  [[ -e $name.baselines.json ]] ||
    snnconv eval "${all[@]}" --data "$data/$set" --baselines -o "$name.baselines.json" --no-page --quiet
}

tune cifar_resnet20.cifar10-t3 cifar10
