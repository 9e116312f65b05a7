#!/usr/bin/env bash
# Make the reports of retrained networks in this folder, and the checkpoints beside it: published
# networks, retrained on the training images (seed 0), evaluated on all 10,000 test images.
#
#   model_zoo/results/retrained.sh DATA CHECKPOINTS [PATTERN]
#
# DATA has cifar10/ and mnist/ (train.npz and test.npz), CHECKPOINTS has
# cifar10_resnet_akamaster/resnet20-12fca82f.th and mnist/shrinkbench_mnistnet.pt.
# What is there already is kept; PATTERN chooses by name. An interrupted training goes on where it
# was left. About three hours on 2 cores; the first 29 epochs of ResNet-20 were run on a GPU, 14 s each.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
data=$(realpath --relative-to="$here" "$1")
checkpoints=$(realpath --relative-to="$here" "$2")
pattern=${3:-.}
work=../../runs/results
cd "$here"
mkdir -p "$work" ../checkpoints

retrain() { # NAME SOURCE DATA_SET RECIPE
  [[ $1 =~ $pattern ]] || return 0
  local file=$work/$1.snn.safetensors resume=
  [[ ! -e $work/$1.train.pt ]] || resume=--resume
  [[ -e $file ]] || snnconv convert "$checkpoints/$2" --data "$data/$3" --recipe "$4" --workers 1 -o "$file" $resume
  cp "$work/$1.convert.json" .
  cp "$file" ../checkpoints/
  for schedule in drain paper; do
    [[ -e $1-$schedule-signed.eval.json ]] ||
      snnconv eval "$file" --data "$data/$3" --schedule $schedule -o "$1-$schedule-signed.eval.json" --quiet
  done
  # T + D = 10, whatever the accuracy.
  [[ $1 != *-t7 || -e $1-drain-3-signed.eval.json ]] ||
    snnconv eval "$file" --data "$data/$3" --drain 3 -o "$1-drain-3-signed.eval.json" --quiet
}

retrain cifar_resnet20.cifar10-t3 cifar10_resnet_akamaster/resnet20-12fca82f.th cifar10 cifar_resnet20_t3
retrain cifar_resnet20.cifar10-t7 cifar10_resnet_akamaster/resnet20-12fca82f.th cifar10 cifar_resnet20_t7
retrain mnist_lenet.mnist-t3 mnist/shrinkbench_mnistnet.pt mnist mnist_lenet_t3
