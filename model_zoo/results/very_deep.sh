#!/usr/bin/env bash
# Make the reports of ResNet-110 in this folder: grown out of ResNet-56, trained for one epoch,
# converted without training at T = 32 and evaluated on 1,000 test images (seed 0).
#
#   model_zoo/results/very_deep.sh DATA CHECKPOINTS
#
# DATA has cifar10/ (train.npz and test.npz), CHECKPOINTS has
# cifar10_resnet_akamaster/resnet56-4bfd9763.th. What is there already is kept.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
data=$(realpath --relative-to="$here" "$1")
checkpoints=$(realpath --relative-to="$here" "$2")
work=../../runs/results
name=resnet110-T32
cd "$here"
mkdir -p "$work"

[[ -e $work/resnet110.safetensors ]] ||
  python grow_resnet110.py "$checkpoints/cifar10_resnet_akamaster/resnet56-4bfd9763.th" \
    "$data/cifar10" "$work/resnet110.safetensors"
[[ -e $work/$name.snn.safetensors ]] ||
  snnconv convert "$work/resnet110.safetensors" --data "$data/cifar10" -T 32 --epochs 0 --calibration mse \
    -o "$work/$name.snn.safetensors" --no-evaluate --quiet
cp "$work/$name.convert.json" .
[[ -e $name-drain-signed-limit1000.eval.json ]] ||
  snnconv eval "$work/$name.snn.safetensors" --data "$data/cifar10" --limit 1000 \
    -o "$name-drain-signed-limit1000.eval.json" --no-page --quiet --ann "$work/resnet110.safetensors"
