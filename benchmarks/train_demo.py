"""Train the demo's network and write ``onnxcompress/demo/digits_cnn.onnx`` and ``digits.npz``.

Run from the root of the repository (two minutes on one core; needs torch, scikit-learn, onnx and onnxruntime)::

    python -m venv venv-demo
    venv-demo/bin/pip install torch==2.13.0 scikit-learn onnx onnxruntime numpy
    PYTHONPATH=. venv-demo/bin/python benchmarks/train_demo.py

The data are the 1,797 images of the UCI handwritten digits that scikit-learn ships. A third, 600 images drawn class by
class, is held out for evaluation and takes no part in training; the calibration images are 512 of the rest. Every
random choice is seeded and torch computes on one thread, so that the same versions give the same file on the same
kind of machine. The last line on stdout is JSON.
"""

from __future__ import annotations

import argparse
import io
import json
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from sklearn.datasets import load_digits
from torch import nn

from onnxcompress.demo import enlarge_digits

EVALUATION = 600
CALIBRATION = 512
DEMO = Path(__file__).resolve().parent.parent / "onnxcompress" / "demo"


def convolution(channels_in: int, channels_out: int, size: int, stride: int) -> list[nn.Module]:
    """A convolution without bias, and its BatchNorm."""
    return [
        nn.Conv2d(channels_in, channels_out, size, stride, size // 2, bias=False),
        nn.BatchNorm2d(channels_out),
    ]


class Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            *convolution(channels_in, channels_out, 3, stride),
            nn.ReLU(),
            *convolution(channels_out, channels_out, 3, 1),
        )
        same = channels_in == channels_out and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(*convolution(channels_in, channels_out, 1, stride))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.branch(x) + self.shortcut(x))


def network() -> nn.Sequential:
    """The demo's network: 34 million multiply-accumulates and 77 thousand weights."""
    return nn.Sequential(
        *convolution(1, 32, 3, 1),
        nn.ReLU(),
        Residual(32, 32, 1),
        Residual(32, 64, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def split_digits(seed: int) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """(training images, labels), (evaluation images, labels): uint8 (N, 8, 8) and (N,), stratified.

    An image that equals one of the held-out ones would be left out of training.
    """
    digits = load_digits()
    images, labels = digits.images.astype(np.uint8), digits.target.astype(np.uint8)
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(images))
    held_out = np.concatenate([order[labels[order] == label][: EVALUATION // 10] for label in range(10)])
    evaluation = generator.permutation(held_out)
    known = {image.tobytes() for image in images[evaluation]}
    training = np.array([i for i in order if images[i].tobytes() not in known])
    return (images[training], labels[training]), (images[evaluation], labels[evaluation])


def train(images: np.ndarray, labels: np.ndarray, epochs: int, seed: int) -> nn.Sequential:
    """The network trained by SGD with shifted copies of the images, a one-cycle learning rate and smoothed labels."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    model = network()
    x, y = torch.from_numpy(enlarge_digits(images)), torch.from_numpy(labels.astype(np.int64))
    batch = 32
    steps = epochs * (len(x) // batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.05)
    for epoch in range(epochs):
        model.train()
        total = 0.0
        for chosen in torch.randperm(len(x))[: len(x) // batch * batch].split(batch):
            loss = criterion(model(shift(x[chosen], 3)), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * batch
        print(f"epoch {epoch + 1}/{epochs}: loss {total / len(x):.4f}", flush=True)
    return model.eval()


def shift(x: torch.Tensor, most: int) -> torch.Tensor:
    """Each image moved by up to ``most`` pixels both ways; the border is empty paper."""
    side = x.shape[-1]
    padded = nn.functional.pad(x, (most,) * 4)
    moves = torch.randint(0, 2 * most + 1, (len(x), 2)).tolist()
    return torch.stack(
        [image[:, dy : dy + side, dx : dx + side] for image, (dy, dx) in zip(padded, moves, strict=True)]
    )


def export(model: nn.Module, path: Path) -> None:
    """Write ONNX with BatchNorm kept apart and a dynamic batch; doc strings, which name local files, are dropped."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this exporter is the one that can leave BatchNorm unfolded
        torch.onnx.export(
            model,
            (torch.zeros(1, 1, 32, 32),),
            str(path),
            dynamo=False,
            opset_version=17,
            input_names=["input"],
            output_names=["logits"],
            dynamic_axes={"input": {0: "N"}, "logits": {0: "N"}},
            training=torch.onnx.TrainingMode.PRESERVE,
            do_constant_folding=False,
        )
    proto = onnx.load(path)
    for node in proto.graph.node:
        node.doc_string = ""
    proto.graph.name = "digits_cnn"
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, path)


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """A compressed ``.npz`` without the time of day that ``np.savez`` writes: the same arrays give the same bytes."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            content = io.BytesIO()
            np.lib.format.write_array(content, array, allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), content.getvalue(), zipfile.ZIP_DEFLATED, 9)


def main() -> None:
    """Train, export, and print the accuracy on the held-out images."""
    parser = argparse.ArgumentParser(description="Train the demo's network and write its model and data.")
    parser.add_argument("--output", type=Path, default=DEMO, help="folder to write to")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start = time.perf_counter()
    (images, labels), (evaluation_images, evaluation_labels) = split_digits(arguments.seed)
    model = train(images, labels, arguments.epochs, arguments.seed)
    path = arguments.output / "digits_cnn.onnx"
    export(model, path)
    data = arguments.output / "digits.npz"
    save_arrays(
        data,
        {
            "calibration_images": images[:CALIBRATION],
            "evaluation_images": evaluation_images,
            "evaluation_labels": evaluation_labels,
        },
    )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    [logits] = session.run(["logits"], {"input": enlarge_digits(evaluation_images)})
    result = {
        "training_images": len(images),
        "accuracy": float(np.mean(logits.argmax(1) == evaluation_labels)),
        "model_bytes": path.stat().st_size,
        "data_bytes": data.stat().st_size,
        "seconds": round(time.perf_counter() - start, 1),
        "torch": torch.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
