"""The names, with their versions, of what reports hold (docs/reports.md)."""

EVALUATION = "snnconv.evaluation/1"
BASELINES = "snnconv.baselines/1"
CONVERSION = "snnconv.conversion/1"
FINETUNING = "snnconv.finetuning/1"
