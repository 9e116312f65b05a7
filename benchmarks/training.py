"""What a step of retraining costs, against a step of ordinary float training of the same network.

    python benchmarks/training.py [--model cifar_resnet20] [--batch 128] [--steps 12] [-o FILE]

All train the same timm network on noise with SGD and the labels' cross entropy, without
distillation: in float, with BatchNorm by batches, images laid out as torch does; quantized as in
inference, with BatchNorm by batches, and so in bfloat16. They take turns, so
that what else the machine does falls on all, and the median of the steps counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import nullcontext
from pathlib import Path

import timm
import torch
import torch.nn.functional as F

from snnconv import __version__, memory
from snnconv.calibrate import calibrate_
from snnconv.folding import fold
from snnconv.graph import trace
from snnconv.model_zoo import register
from snnconv.plan import make_plan
from snnconv.preprocess import Preprocessing
from snnconv.train import Student


def main() -> None:
    """Measure, print and store the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="cifar_resnet20")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--timesteps", type=int, default=3)
    parser.add_argument("--weight-bits", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    memory.keep_freed()
    register()
    torch.manual_seed(0)
    model = timm.create_model(args.model)
    cfg = model.pretrained_cfg
    preprocessing = Preprocessing(tuple(cfg["input_size"]), tuple(cfg["mean"]), tuple(cfg["std"]))
    traced = trace(model, preprocessing.input_size)
    plan = make_plan(traced)
    qann = fold(traced, plan)
    pixels = torch.randint(0, 256, (args.batch, *preprocessing.input_size), dtype=torch.uint8)
    calibrate_(qann, [preprocessing.normalize(pixels[:16])], args.timesteps)
    student = Student(traced, plan, qann, preprocessing, args.timesteps, args.weight_bits)
    student.to(args.device)
    student.qann.to(args.device)
    model.to(args.device).train()
    pixels = pixels.to(args.device)
    labels = torch.randint(0, model.num_classes, (args.batch,), device=args.device)
    halves = torch.autocast(args.device, torch.bfloat16, cache_enabled=False)
    ways = {
        "float": (model, False, nullcontext()),
        "quantized": (student, False, nullcontext()),
        "batch_statistics": (student, True, nullcontext()),
        "batch_statistics_bf16": (student, True, halves),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    optimizers = {m: torch.optim.SGD(m.parameters(), 1e-4, 0.9) for m in (model, student)}
    for step in range(args.steps + 2):
        for name, (network, student.batch_statistics, precision) in ways.items():
            start = time.perf_counter()
            optimizers[network].zero_grad()
            with precision:
                if network is model:
                    logits = model(preprocessing.normalize(pixels))
                else:
                    logits = student(pixels)["logits"].flatten(1)
                loss = F.cross_entropy(logits, labels)
            loss.backward()
            optimizers[network].step()
            if network is student and student.batch_statistics:
                student.norms.follow_()
            if args.device == "cuda":
                torch.cuda.synchronize()
            if step >= 2:
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    report = {
        "schema": "snnconv.benchmark.training/2",
        "version": __version__,
        "model": args.model,
        "batch": args.batch,
        "timesteps": args.timesteps,
        "weight_bits": args.weight_bits,
        "steps": args.steps,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "seconds_per_step": medians,
        "ratios": {n: medians[n] / medians["float"] for n in ways if n != "float"},
    }
    print(json.dumps(report, indent=2))
    if args.output:
        args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
