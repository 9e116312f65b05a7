#!/usr/bin/env bash
# Make the reports of all schedules at T = 3 and 7 in this folder, of the networks that come with
# snnconv, on all test images; make docs puts them side by side in docs/schedules.html.
#
#   model_zoo/results/schedules.sh DATA CHECKPOINTS
#
# DATA has cifar10/ (train.npz and test.npz), CHECKPOINTS has
# cifar10_resnet_akamaster/resnet20-12fca82f.th. Reports that tell operations are kept.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
data=$(realpath --relative-to="$here" "$1")
checkpoints=$(realpath --relative-to="$here" "$2")
cd "$here"

for t in 3 7; do
  name=cifar_resnet20.cifar10-t$t
  for schedule in paper drain stagger wait; do
    report=$name-$schedule-signed.eval.json
    grep -qs '"membrane_updates"' "$report" ||
      snnconv eval "../checkpoints/$name.snn.safetensors" --data "$data/cifar10" \
        --schedule $schedule --ann "$checkpoints/cifar10_resnet_akamaster/resnet20-12fca82f.th" \
        -o "$report" --force --quiet --no-page
  done
done
