#!/usr/bin/env bash
# Make the reports in this folder: training-free conversion of published CIFAR-10 ResNets,
# evaluated on all 10,000 test images, calibrated on 1,000 training images (seed 0).
#
#   model_zoo/results/cifar10_resnet.sh DATA CHECKPOINTS [PATTERN]
#
# DATA has train.npz and test.npz, CHECKPOINTS resnet20-12fca82f.th and resnet56-4bfd9763.th.
# Reports that are there already are kept; PATTERN chooses by name. About 90 minutes on 2 cores.
# The stagger runs of ResNet-56 (15 minutes each) are stored for 1,000 images so far (--limit 1000).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
data=$(realpath --relative-to="$here" "$1")
checkpoints=$(realpath --relative-to="$here" "$2")
pattern=${3:-.}
work=../../runs/results
cd "$here"
mkdir -p "$work"

convert() { # NAME SOURCE T
  [[ -e $work/$1.snn.safetensors ]] ||
    snnconv convert "$checkpoints/$2" --data "$data" -T "$3" -o "$work/$1.snn.safetensors" --quiet
  cp "$work/$1.convert.json" .
}

evaluate() { # REPORT NAME OPTIONS...
  local report=$1.eval.json name=$2
  shift 2
  [[ -e $report || ! $report =~ $pattern ]] ||
    snnconv eval "$work/$name.snn.safetensors" --data "$data" -o "$report" --quiet "$@"
}

for t in 8 15 32 3; do
  convert resnet20-T$t resnet20-12fca82f.th $t
  evaluate resnet20-T$t-drain-signed resnet20-T$t --ann "$checkpoints/resnet20-12fca82f.th"
done
for schedule in paper wait stagger; do
  for neuron in signed unsigned; do
    evaluate resnet20-T8-$schedule-$neuron resnet20-T8 --schedule $schedule --neuron $neuron
  done
done
evaluate resnet20-T8-drain-unsigned resnet20-T8 --neuron unsigned

convert resnet56-T15 resnet56-4bfd9763.th 15
evaluate resnet56-T15-drain-signed resnet56-T15 --ann "$checkpoints/resnet56-4bfd9763.th"
for schedule in paper wait stagger; do
  for neuron in signed unsigned; do
    evaluate resnet56-T15-$schedule-$neuron resnet56-T15 --schedule $schedule --neuron $neuron
  done
done
