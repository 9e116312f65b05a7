#!/usr/bin/env bash
# Make the reports of retrained networks in this folder, and the checkpoints beside it: published
# networks and a VGG-11 trained here, retrained on the training images (seed 0 if the name says no other), evaluated on all
# 10,000 test images (MobileNetV1 on 800).
#
#   model_zoo/results/retrained.sh DATA CHECKPOINTS [PATTERN]
#
# DATA has cifar10/ and mnist/ (train.npz and test.npz) and imagenet_sample/, CHECKPOINTS has
# cifar10_resnet_akamaster/resnet20-12fca82f.th, resnet56-4bfd9763.th, mnist/shrinkbench_mnistnet.pt
# and imagenet_models/mobilenetv1_100_tf_in1k.fp16.safetensors.
# What is there already is kept; PATTERN chooses by name. An interrupted training goes on where it
# was left. ResNet-20 took 4 minutes for T = 3 on one GPU, and on two cores 2 minutes an epoch for T = 7
# and for 4-bit weights, which start from it, as a second training for T = 3 on mixed images does.
# VGG-11 took 4, ResNet-56 7 minutes an epoch.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
data=$(realpath --relative-to="$here" "$1")
checkpoints=$(realpath --relative-to="$here" "$2")
pattern=${3:-.}
work=../../runs/results
cd "$here"
mkdir -p "$work" ../checkpoints

retrain() { # NAME SOURCE DATA_SET RECIPE [OPTION...]
  [[ $1 =~ $pattern ]] || return 0
  local file=$work/$1.snn.safetensors resume=
  [[ ! -e $work/$1.train.pt ]] || resume=--resume
  [[ -e $file ]] || snnconv convert "$2" --data "$data/$3" --recipe "$4" --workers 1 --no-evaluate -o "$file" $resume "${@:5}"
  cp "$work/$1.convert.json" .
  # Larger ones are not kept in this repository.
  (($(stat -c %s "$file") > 2**20)) || cp "$file" ../checkpoints/
  for schedule in drain paper; do
    [[ -e $1-$schedule-signed.eval.json ]] ||
      snnconv eval "$file" --data "$data/$3" --schedule $schedule --ann "$2" \
        -o "$1-$schedule-signed.eval.json" --quiet --no-page
  done
  # T + D = 10, whatever the accuracy.
  [[ $1 != *-t7 || -e $1-drain-3-signed.eval.json ]] ||
    snnconv eval "$file" --data "$data/$3" --drain 3 -o "$1-drain-3-signed.eval.json" --quiet --no-page
}

resnet20=$checkpoints/cifar10_resnet_akamaster/resnet20-12fca82f.th
retrain cifar_resnet20.cifar10-t3 "$resnet20" cifar10 cifar_resnet20_t3
for seed in 1 2; do
  retrain cifar_resnet20.cifar10-t3-seed$seed "$resnet20" cifar10 cifar_resnet20_t3 --seed $seed
done
retrain cifar_resnet20.cifar10-t3-mix "$resnet20" cifar10 cifar_resnet20_t3_mix \
  --start-from ../checkpoints/cifar_resnet20.cifar10-t3.snn.safetensors
retrain cifar_resnet20.cifar10-t2 "$resnet20" cifar10 cifar_resnet20_t2 \
  --start-from ../checkpoints/cifar_resnet20.cifar10-t3.snn.safetensors
retrain cifar_resnet20.cifar10-t1 "$resnet20" cifar10 cifar_resnet20_t1 \
  --start-from $work/cifar_resnet20.cifar10-t2.snn.safetensors
retrain cifar_resnet20.cifar10-t3-w4 "$resnet20" cifar10 cifar_resnet20_t3_w4 \
  --start-from ../checkpoints/cifar_resnet20.cifar10-t3.snn.safetensors
retrain cifar_resnet20.cifar10-t3-w2 "$resnet20" cifar10 cifar_resnet20_t3_w2 \
  --start-from ../checkpoints/cifar_resnet20.cifar10-t3-w4.snn.safetensors
retrain cifar_resnet20.cifar10-t7 "$resnet20" cifar10 cifar_resnet20_t7 \
  --start-from ../checkpoints/cifar_resnet20.cifar10-t3.snn.safetensors
# The network for three steps does with seven as well.
at7=cifar_resnet20.cifar10-t3-at7-endpoint.eval.json
[[ ! $at7 =~ $pattern || -e $at7 ]] ||
  snnconv eval ../checkpoints/cifar_resnet20.cifar10-t3.snn.safetensors --data "$data/cifar10" --timesteps 7 \
    --schedule wait --engine endpoint --ann "$resnet20" -o $at7 --quiet --no-page

resnet56=$checkpoints/cifar10_resnet_akamaster/resnet56-4bfd9763.th
retrain cifar_resnet56.cifar10-t3 "$resnet56" cifar10 cifar_resnet56_t3

# VGG-11 is trained in float first.
vgg11=$work/cifar_vgg11.safetensors
[[ ! cifar_vgg11.cifar10-t3 =~ $pattern || -e $vgg11 ]] ||
  python train_float.py cifar_vgg11 "$data/cifar10" "$vgg11" --workers 1
retrain cifar_vgg11.cifar10-t3 "$vgg11" cifar10 cifar_vgg11_t3

lenet=$checkpoints/mnist/shrinkbench_mnistnet.pt
retrain mnist_lenet.mnist-t3 "$lenet" mnist mnist_lenet_t3
retrain mnist_lenet.mnist-t1 "$lenet" mnist mnist_lenet_t1

# Without labels, on the images that calibrate alone. The checkpoint is too large for this repository.
name=mobilenetv1-T15-retrained source=$checkpoints/imagenet_models/mobilenetv1_100_tf_in1k.fp16.safetensors
if [[ $name =~ $pattern ]]; then
  [[ -e $work/$name.snn.safetensors ]] ||
    snnconv convert "$source" --data "$data/imagenet_sample" --recipe mobilenetv1_100_tf_t15 \
      --calibration-images 200 --limit 8 --no-evaluate --workers 1 -o "$work/$name.snn.safetensors" --quiet
  cp "$work/$name.convert.json" .
  [[ -e $name-endpoint.eval.json ]] ||
    snnconv eval "$work/$name.snn.safetensors" --data "$data/imagenet_sample" -o "$name-endpoint.eval.json" \
      --no-page --quiet --schedule wait --engine endpoint --ann "$source"
fi
