#!/usr/bin/env bash
# Make the reports of training-free conversion in this folder: published networks, evaluated on all
# test images, calibrated on 1,000 training images (seed 0), by clips alone. Of the ImageNet sample,
# 200 images reconstruct and the other 800 are measured, at the end point of the exact schedules.
#
#   model_zoo/results/training_free.sh DATA CHECKPOINTS [PATTERN]
#
# DATA has cifar10/ and mnist/ (train.npz and test.npz) and imagenet_sample/ (image folders).
# CHECKPOINTS has cifar10_resnet_akamaster/resnet{20-12fca82f,56-4bfd9763}.th,
# mnist/shrinkbench_mnistnet.pt and imagenet_models/*.safetensors.
# Reports that are there already are kept; PATTERN chooses by name. About two hours on 2 cores.
# The stagger runs of ResNet-56 (15 minutes each) are stored for 1,000 images so far (--limit 1000).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
data=$(realpath --relative-to="$here" "$1")
checkpoints=$(realpath --relative-to="$here" "$2")
pattern=${3:-.}
work=../../runs/results
cd "$here"
mkdir -p "$work"

network() { # NAME SOURCE DATA_SET T OPTIONS...: what the next reports are of; convert it
  name=$1 source=$checkpoints/$2 data_set=$data/$3
  [[ $name =~ $pattern ]] || return 0
  [[ -e $work/$name.snn.safetensors ]] ||
    snnconv convert "$source" --data "$data_set" -T "$4" --epochs 0 -o "$work/$name.snn.safetensors" --no-evaluate --quiet "${@:5}"
  cp "$work/$name.convert.json" .
}

evaluate() { # SUFFIX OPTIONS...: a report of the network named last
  local report=$name-$1.eval.json
  [[ -e $report || ! $name =~ $pattern ]] ||
    snnconv eval "$work/$name.snn.safetensors" --data "$data_set" -o "$report" --no-page --quiet "${@:2}"
}

schedules() { # every schedule with either neuron, but for the one with --ann
  for schedule in paper wait stagger; do
    for neuron in signed unsigned; do
      evaluate $schedule-$neuron --schedule $schedule --neuron $neuron
    done
  done
}

for t in 8 15 32 3; do
  network resnet20-T$t cifar10_resnet_akamaster/resnet20-12fca82f.th cifar10 $t --calibration mse
  evaluate drain-signed --ann "$source"
  if [[ $t == 8 ]]; then
    schedules
    evaluate drain-unsigned --neuron unsigned
  fi
done
for t in 3 8 15 32; do # what the default makes of the same network
  network resnet20-reconstructed-T$t cifar10_resnet_akamaster/resnet20-12fca82f.th cifar10 $t
  evaluate drain-signed --ann "$source"
done
network resnet56-T15 cifar10_resnet_akamaster/resnet56-4bfd9763.th cifar10 15 --calibration mse
evaluate drain-signed --ann "$source"
schedules

network lenet-T7 mnist/shrinkbench_mnistnet.pt mnist 7 --recipe mnist_lenet --calibration mse
evaluate drain-signed --ann "$source"

imagenet() { # NAME FILE RECIPE: where exact schedules end (eval measures the ANN, so convert need not)
  for t in 31 15 63; do
    network "$1-T$t" "imagenet_models/$2.fp16.safetensors" imagenet_sample $t --recipe "$3" \
      --calibration-images 200 --limit 8
    evaluate endpoint --schedule wait --engine endpoint --ann "$source"
  done
}
imagenet mobilenetv1 mobilenetv1_100_tf_in1k mobilenetv1_100_tf
imagenet mobilenetv2 mobilenetv2_100_tf2_in1k mobilenetv2_100_tf
imagenet squeezenet squeezenet1_0_deepcompressed_bgr squeezenet1_0_caffe
