"""A report that has something to show in every section."""

from deploykit.artifacts import Report

LABELS = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def stage(name, accuracy, first, second, size, macs=41_200_000, parameters=272_474):
    return {
        "name": name,
        "validation_accuracy": accuracy,
        "latency_ms": {"1": first, "32": second},
        "size_bytes": size,
        "macs": macs,
        "parameters": parameters,
        "seconds": 200.0,
    }


def make_trial(number, speedup, accuracy, milliseconds, *, passed):
    why = f"expected a validation drop of at most 1.00%, got {0.884 - accuracy:.2%}"
    drop = {"name": "max_drop", "limit": 0.01, "value": 0.884 - accuracy, "passed": passed,
            "why": why}  # fmt: skip
    return {
        "number": number,
        "chosen": passed,
        "pruned": {"speedup": speedup},
        "keep_float": ["linear"] if passed else [],
        "pruned_speedup": speedup,
        "speedup": 1.5 * speedup,
        "checks": [drop],
        "passed": passed,
        "failed": "",
        "told": f"a drop of {0.884 - accuracy:.2%}",
        "final": "quantize",
        "validation_accuracy": accuracy,
        "latency_ms": {"1": milliseconds, "32": 30 * milliseconds},
        "size_bytes": 200_000,
    }


def make_details():
    curve = [
        {
            "epoch": epoch,
            "loss": 1.2 / (epoch + 1) + 0.2,
            "train_accuracy": 0.9 - 0.3 / (epoch + 1),
            "torch_validation_accuracy": 0.91 - 0.25 / (epoch + 1),
            "lr": 0.01 * (10 - epoch) / 10,
            "seconds": 12.0,
        }
        for epoch in range(10)
    ]
    spans = [
        {"first_epoch": 0, "last_epoch": 3, "parameters": ["layer3.0.conv1.weight", "fc.weight"]},
        {"first_epoch": 4, "last_epoch": 9, "parameters": ["conv1.weight", "layer1.0.conv1.weight",
         "layer2.0.conv1.weight", "layer3.0.conv1.weight", "fc.weight"]},
    ]  # fmt: skip
    measured = {"median_ms": 0.61, "p90_ms": 0.7, "verdict": "faster"}
    matrix = [[85 if i == j else (i * 7 + j * 3) % 5 for j in range(10)] for i in range(10)]
    return {
        "curves": {"train": curve, "prune": curve[:5], "quantize": curve[:1]},
        "trained": {"train": spans, "prune": spans[1:]},
        "latency": {
            "prune": {"1": {**measured, "median_ms": 0.8, "ratio": 1.22, "interval": [1.2, 1.24]},
                      "32": {**measured, "ratio": 1.3, "interval": [1.28, 1.33]}},
            "quantize": {"1": {**measured, "ratio": 1.61, "interval": [1.58, 1.63]},
                         "32": {**measured, "ratio": 1.7, "interval": [1.66, 1.75]}},
        },
        "widths": [{"layer": f"layer{i // 3 + 1}.{i % 3}.conv1", "before": 16 * 2 ** (i // 3),
                    "after": 16 * 2 ** (i // 3) - 16 * (i // 4)} for i in range(9)],
        "left_alone": [{"layer": "layer2.0", "why": "its shortcut is padded"}],
        "fusion": {
            "integer": [f"layer{i}" for i in range(18)],
            "float": [{"name": "head.gate", "operator": "Conv",
                       "why": "HardSwish behind it comes before its QuantizeLinear"}],
            "operators": {"QLinearConv": 18, "Conv": 1, "QLinearAdd": 9, "QGemm": 1},
        },
        "confusion": {"baseline": matrix, "final": matrix},
        "labels": LABELS,
        "per_class": [{"label": label, "baseline": 0.88, "final": 0.88 + (i - 5) / 300}
                      for i, label in enumerate(LABELS)],
        "parity": {"top1_agreement": 0.994, "max_steps": 3.0, "samples": 512},
        "normalization": {"share": 0.0712, "interval": [0.068, 0.0744]},
        "provenance": {"recipe": "recipes/cifar10_resnet20.yaml"},
        "trials": [
            make_trial(1, 3.0, 0.861, 0.46, passed=False),
            make_trial(2, 1.8, 0.879, 0.61, passed=True),
        ],
        "layers_ms": [{"layer": f"layer{i // 3 + 1}.{i % 3}.conv1", "before": 0.09 + i / 200,
                       "after": None if i == 4 else 0.05} for i in range(9)]
        + [{"layer": "", "before": 0.02, "after": 0.03}],
        "rounding": {"together": 21.3, "weights": {"conv1": 30.1, "layer1.0.conv1": 38.0},
                     "tensors": {"layer1.0.relu": 25.5}},
        "pruning": {
            "removed": ["layer2.1"],
            "bounds": [{"unit": "ms at batch 1", "before": 1.6, "bound": 0.9, "predicted": 0.88,
                        "measured": 0.91}],
            "sensitivity": {
                "blocks": [{"block": "layer2.1", "divergence": 0.04}],
                "groups": [{"layers": "layer1.0.conv1, layer1.0.conv2", "width": 16,
                            "divergence": {"8": 0.2, "12": 0.1}}],
            },
        },
        "warnings": ["12 images are in train and in test; the test accuracy flatters"],
        "commands": ["deploykit compress recipes/cifar10_resnet20.yaml --out runs/cifar10"],
    }  # fmt: skip


def sample_report():
    """Return a report in which every section has something to show."""
    train = stage("train", 0.884, 0.98, 29.0, 1_083_000)
    prune = stage("prune", 0.881, 0.80, 22.3, 800_000, 30_100_000, 201_000)
    quantize = stage("quantize", 0.879, 0.61, 17.0, 276_000, 30_100_000, 201_000)
    return Report(
        name="cifar10-resnet20",
        seed=0,
        target="cpu-x86-vnni",
        threads=1,
        environment={
            "cpu": "Some CPU @ 2.50GHz",
            "features": ["avx2", "avx512_vnni"],
            "memory_bytes": 25_000_000_000,
            "versions": {"torch": "2.13.0", "onnxruntime": "1.31.1", "onnx": None},
        },
        stages=(train, prune, quantize),
        baseline={**train, "accuracy": 0.881},
        final={**quantize, "accuracy": 0.8752},
        drop={"value": 0.0058, "interval": [0.0021, 0.0095]},
        budget={"metric": "accuracy", "max_drop": 0.01, "min_speedup": 1.5, "passed": True},
        decisions=(
            {"stage": "prune", "kept": True, "why": "1.22 times faster for 0.30 points"},
            {"stage": "quantize", "kept": True, "why": "qat: ptq lost 1.4 points"},
        ),
        details=make_details(),
    )
