#!/usr/bin/env bash
# Make the reports of Spiking ResNet in this folder: published networks without training, unsigned
# neurons, clips by the 99.9 percentile of 1,000 training images (seed 0). With and without
# shortcut normalisation and compensation; T = 32 on all 10,000 test images, T = 100 and 350 on
# 1,000 of them (seed 0).
#
#   model_zoo/results/spiking_resnet.sh DATA CHECKPOINTS [PATTERN]
#
# DATA has cifar10/ (train.npz and test.npz), CHECKPOINTS has
# cifar10_resnet_akamaster/resnet{20-12fca82f,32-d509ac18,56-4bfd9763}.th. Reports that are there
# already are kept; PATTERN chooses by name.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
data=$(realpath --relative-to="$here" "$1")
checkpoints=$(realpath --relative-to="$here" "$2")
pattern=${3:-.}
work=../../runs/results
cd "$here"
mkdir -p "$work"

measure() { # NAME FILE T LIMIT OPTION...: convert and evaluate
  [[ $1 =~ $pattern ]] || return 0
  [[ ! -e $1.eval.json ]] || return 0
  local network=$work/$1.snn.safetensors
  [[ -e $network ]] ||
    snnconv convert "$checkpoints/cifar10_resnet_akamaster/$2.th" --data "$data/cifar10" \
      --recipe spiking_resnet -T "$3" --limit "$4" -o "$network" --no-evaluate --quiet "${@:5}"
  cp "$work/$1.convert.json" .
  snnconv eval "$network" --data "$data/cifar10" --limit "$4" -o "$1.eval.json" --no-page --quiet
}

ways() { # NAME FILE T LIMIT: every way to convert it
  measure "$1-none" "${@:2}"
  measure "$1-zero" "${@:2}" --initial-membrane zero
  measure "$1-gain" "${@:2}" --compensation gain
  measure "$1-bias" "${@:2}" --compensation bias
  measure "$1-unnormalized-none" "${@:2}" --no-shortcut-normalization
  measure "$1-unnormalized-gain" "${@:2}" --no-shortcut-normalization --compensation gain
  measure "$1-unnormalized-bias" "${@:2}" --no-shortcut-normalization --compensation bias
}

for limit in 10000:32 1000:100 1000:350; do
  t=${limit#*:}
  for network in 20-12fca82f 56-4bfd9763 32-d509ac18; do
    ways "spiking-resnet${network%-*}-T$t" "resnet$network" "$t" "${limit%:*}"
  done
done
