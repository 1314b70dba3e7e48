"""Which architectures channel pruning reaches, and whether what it cuts is exact.

Two steps, because the second needs no torch::

    python benchmarks/pruning_coverage.py export FOLDER     # torch, torchvision, onnxscript
    python benchmarks/pruning_coverage.py check FOLDER      # onnxcompress

``export`` writes topologies of torchvision, a U-Net and a text encoder with random weights (BatchNormalization
statistics too, so that nothing is trivially zero), by the TorchScript exporter and by the dynamo exporter, with a
dynamic batch. ``check`` removes random channels of every file until 0.75 of the MACs remain, and holds the result
against the original with these channels masked at every consumer: relative L2 at most 1e-5 without runtime
optimisation, at two batch sizes. The last line of stdout is JSON; the exit code is 1 where a file misses its aim.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

#: MACs that must remain at most; transformers are cut by heads and FFN neurons alone
AIM = 0.75
TOLERANCE = 1e-5
#: may decline, with reasons
MAY_DECLINE = frozenset(("swin",))


# ---- export: needs torch --------------------------------------------------------------------------------------------


def export(folder: Path, only: str | None) -> int:
    """Write every topology by both exporters; what an exporter cannot do is told and left out."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    for name, size, build in topologies():
        for exporter in ("torchscript", "dynamo"):
            path = folder / f"{name}.{exporter}.onnx"
            if path.exists() or (only is not None and only not in path.name):
                continue
            torch.manual_seed(0)
            model = build().eval()
            randomise(model)
            start = time.perf_counter()
            try:
                write(model, torch.randn(2, *size), path, exporter)
            except Exception as error:  # exporters raise whatever they like
                print(f"{path.name}: not exported: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
                continue
            print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB, {time.perf_counter() - start:.0f} s", flush=True)
    return 0


def topologies() -> Iterator[tuple[str, tuple[int, ...], Callable[[], Any]]]:
    """(name, shape of a sample, constructor); widths and depths are cut down where a file would be large."""
    from functools import partial

    from torch import nn
    from torchvision import models as tv
    from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
    from torchvision.models.swin_transformer import SwinTransformer
    from torchvision.models.vision_transformer import VisionTransformer

    def vgg() -> Any:
        model = tv.vgg11_bn(num_classes=10, init_weights=False)
        model.avgpool = nn.AdaptiveAvgPool2d((2, 2))
        model.classifier[0], model.classifier[3] = nn.Linear(512 * 4, 512), nn.Linear(512, 512)
        model.classifier[6] = nn.Linear(512, 10)
        return model

    image = (3, 64, 64)
    yield "resnet18", image, partial(ResNet, BasicBlock, [2, 2, 2, 2], num_classes=10)
    yield "resnet50", image, partial(ResNet, Bottleneck, [2, 2, 2, 2], num_classes=10)
    yield "wide_resnet", image, partial(ResNet, Bottleneck, [1, 2, 1, 1], num_classes=10, width_per_group=128)
    yield "resnext", image, partial(ResNet, Bottleneck, [2, 2, 2, 1], num_classes=10, groups=32, width_per_group=4)
    yield "vgg11_bn", image, vgg
    yield "densenet", image, partial(tv.DenseNet, 16, (3, 4, 6, 4), 32, num_classes=10)
    yield "squeezenet", image, partial(tv.squeezenet1_1, num_classes=10)
    yield "mobilenet_v2", image, partial(tv.mobilenet_v2, num_classes=10)
    yield "mobilenet_v3_small", image, partial(tv.mobilenet_v3_small, num_classes=10)
    yield "mobilenet_v3_large", image, partial(tv.mobilenet_v3_large, num_classes=10)
    yield "efficientnet_b0", image, partial(tv.efficientnet_b0, num_classes=10)
    yield "efficientnet_v2_s", image, partial(tv.efficientnet_v2_s, num_classes=10)
    yield "shufflenet_v2", image, partial(tv.shufflenet_v2_x1_0, num_classes=10)
    yield "googlenet", image, partial(tv.googlenet, num_classes=10, aux_logits=False, init_weights=False)
    yield "inception_v3", (3, 96, 96), partial(tv.inception_v3, num_classes=10, aux_logits=False, init_weights=False)
    yield "regnet_x", image, partial(tv.regnet_x_400mf, num_classes=10)
    yield "regnet_y", image, partial(tv.regnet_y_400mf, num_classes=10)
    yield "convnext", image, partial(tv.convnext_tiny, num_classes=10)
    yield "mnasnet", image, partial(tv.mnasnet0_5, num_classes=10)
    yield "fcn", image, partial(_segmentation, tv.segmentation.fcn_resnet50)
    yield "deeplab", image, partial(_segmentation, tv.segmentation.deeplabv3_mobilenet_v3_large)
    yield "lraspp", image, partial(_segmentation, tv.segmentation.lraspp_mobilenet_v3_large)
    yield "unet", image, _unet
    yield (
        "vit",
        image,
        partial(VisionTransformer, 64, 16, num_layers=4, num_heads=6, hidden_dim=192, mlp_dim=768, num_classes=10),
    )
    yield "swin", image, partial(SwinTransformer, [4, 4], 48, [2, 2, 2], [3, 6, 12], [4, 4], num_classes=10)
    yield "encoder", (24,), _encoder


def _segmentation(build: Callable[..., Any]) -> Any:
    from torch import nn

    class Only(nn.Module):
        """The main output alone."""

        def __init__(self) -> None:
            super().__init__()
            self.model = build(weights=None, weights_backbone=None, num_classes=5)

        def forward(self, x: Any) -> Any:
            return self.model(x)["out"]

    return Only()


def _unet() -> Any:
    import torch
    from torch import nn
    from torch.nn import functional

    def block(entering: int, leaving: int) -> Any:
        return nn.Sequential(
            nn.Conv2d(entering, leaving, 3, padding=1, bias=False),
            nn.BatchNorm2d(leaving),
            nn.ReLU(),
            nn.Conv2d(leaving, leaving, 3, padding=1),
            nn.GroupNorm(4, leaving),
            nn.SiLU(),
        )

    class UNet(nn.Module):
        """Three levels; one way up by ConvTranspose, one by interpolation."""

        def __init__(self) -> None:
            super().__init__()
            self.down1, self.down2, self.bottom = block(3, 16), block(16, 32), block(32, 64)
            self.up2, self.up1 = nn.ConvTranspose2d(64, 32, 2, stride=2), nn.Conv2d(32, 16, 1)
            self.merge2, self.merge1 = block(64, 32), block(32, 16)
            self.head = nn.Conv2d(16, 2, 1)

        def forward(self, x: Any) -> Any:
            one = self.down1(x)
            two = self.down2(functional.max_pool2d(one, 2))
            bottom = self.bottom(functional.max_pool2d(two, 2))
            up = self.merge2(torch.cat([self.up2(bottom), two], 1))
            up = functional.interpolate(self.up1(up), size=one.shape[2:], mode="bilinear", align_corners=False)
            return self.head(self.merge1(torch.cat([one, up], 1)))

    return UNet()


def _encoder() -> Any:
    import torch
    from torch import nn

    class Encoder(nn.Module):
        """Token embeddings and a stack of post-norm transformer layers, mean pooling."""

        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.positions = nn.Embedding(100, 64), nn.Parameter(torch.randn(1, 24, 64))
            layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, activation="gelu", batch_first=True)
            self.layers = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
            self.head = nn.Linear(64, 8)

        def forward(self, ids: Any) -> Any:
            ids = (ids.abs() * 30).to(torch.int64).clamp(0, 99)
            return self.head(self.layers(self.tokens(ids) + self.positions).mean(1))

    torch.backends.mha.set_fastpath_enabled(False)
    return Encoder()


def randomise(model: Any) -> None:
    """Give what is constant at the start, and so has no effect, values of its own."""
    import torch

    for module in model.modules():
        for name, low, high in (("running_var", 0.5, 1.5), ("running_mean", -0.3, 0.3)):
            if getattr(module, name, None) is not None:
                getattr(module, name).uniform_(low, high)
        for parameter in module.parameters(recurse=False):
            with torch.no_grad():
                if parameter.numel() and (parameter.max() - parameter.min()) < 1e-6:
                    parameter.add_(torch.empty_like(parameter).uniform_(-0.3, 0.3))


def write(model: Any, sample: Any, path: Path, exporter: str) -> None:
    """Export with a dynamic batch; where the exporter cannot, with the batch of the sample."""
    import torch

    if exporter == "torchscript":
        torch.onnx.export(
            model,
            (sample,),
            path,
            dynamo=False,
            opset_version=17,
            input_names=["x"],
            output_names=["y"],
            dynamic_axes={"x": {0: "N"}, "y": {0: "N"}},
        )
        return
    batch = {0: torch.export.Dim("N", min=1, max=64)}
    try:
        program = torch.onnx.export(model, (sample,), dynamo=True, dynamic_shapes=(batch,), verbose=False)
    except Exception:  # a topology that the exporter can only specialise
        program = torch.onnx.export(model, (sample,), dynamo=True, verbose=False)
    program.save(path, external_data=False)


# ---- check: needs onnxcompress --------------------------------------------------------------------------------------


def check(folder: Path, only: str | None, verbose: bool, output: Path | None) -> int:
    """Cut every file of ``folder`` and compare; with ``output`` as JSON there, and as a table beside it."""
    from bench import revision

    from onnxcompress.environment import describe_environment

    rows = []
    for path in sorted(folder.glob("*.onnx")):
        if only is None or only in path.name:
            rows.append(check_file(path, verbose))
            print(line(rows[-1]), flush=True)
    failed = [row["model"] for row in rows if not row["passed"]]
    facts = {
        "aim": AIM,
        "tolerance": TOLERANCE,
        "environment": describe_environment(),
        "revision": revision(),
        "models": rows,
        "failed": failed,
    }
    if output is not None:
        output.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        output.with_suffix(".md").write_text(markdown(facts), encoding="utf-8")
    print(json.dumps(facts))
    return 1 if failed or not rows else 0


def check_file(path: Path, verbose: bool) -> dict[str, Any]:
    """One file: coupled, cut at random to the aim, valid, and equal to its masked original."""
    import numpy as np
    import onnx

    from onnxcompress.io import load
    from onnxcompress.passes.eliminate_dead_nodes import EliminateDeadNodes
    from onnxcompress.passes.fold_constants import FoldConstants
    from onnxcompress.proto import to_proto
    from onnxcompress.pruning.coupling import couple
    from onnxcompress.pruning.prepare import unshare_vectors
    from onnxcompress.pruning.surgery import masked, remove_channels

    row: dict[str, Any] = {"model": path.name.removesuffix(".onnx"), "passed": False}
    try:
        graph = EliminateDeadNodes()(FoldConstants()(load(path)).graph).graph
        unshare_vectors(graph)
        start = time.perf_counter()
        coupling = couple(graph)
        row["seconds"] = round(time.perf_counter() - start, 3)
        free = [g for g in coupling.groups if g.pinned is None]
        row |= {"groups": len(coupling.groups), "free": len(free), "channels": sum(g.channels for g in free)}
        if verbose:
            for group in coupling.groups:
                print(
                    "  ", group.name, group.kind, group.channels, group.producers[:3], group.consumers[:3], group.pinned
                )
        row["reasons"] = sorted({g.pinned for g in coupling.groups if g.pinned is not None})
        dense = macs(graph)
        if not dense:
            raise ValueError("no node of known shape multiplies")
        rng = np.random.default_rng(0)
        order = {g.name: rng.permutation(g.channels) for g in free}
        for percent in range(95, 0, -5):
            keep = {n: np.sort(o[: max(1, round(len(o) * percent / 100))]) for n, o in order.items()}
            cut, _ = remove_channels(graph, coupling.groups, keep, coupling)
            row["macs"] = round(macs(cut) / dense, 4)
            if row["macs"] <= AIM:
                break
        onnx.checker.check_model(to_proto(cut), full_check=True)
        reference = masked(graph, coupling.groups, keep, coupling)
        row["relative_l2"] = max(difference(reference, cut, graph, batch) for batch in (1, 3))
        row["changed"] = difference(graph, cut, graph, 2)
        reached = row["macs"] <= AIM or row["model"].split(".")[0] in MAY_DECLINE
        row["passed"] = bool(reached and row["relative_l2"] <= TOLERANCE and row["changed"] > 1e-3)
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if verbose:
            raise
    return row


def macs(graph: Any) -> int:
    """Multiply-accumulates of a graph for one sample."""
    from onnxcompress.shapes import infer_shapes, node_macs

    declared = {t.name: (1, *t.shape[1:]) for t in graph.inputs}
    return sum(node_macs(graph, infer_shapes(graph, declared)).values())


def difference(first: Any, second: Any, graph: Any, batch: int) -> float:
    """The largest relative L2 of an output on random inputs, without runtime optimisation."""
    from onnxcompress.data import synthetic_data
    from onnxcompress.graph import input_specs
    from onnxcompress.verify import compare

    specs = input_specs(graph)
    data = synthetic_data(specs, graph=graph, samples=batch, batch=batch, seed=batch)
    return max(o.relative_l2 for o in compare(first, second, data))


def markdown(facts: Mapping[str, Any]) -> str:
    """A line a topology and exporter."""
    from common import table

    cells = [
        (
            *row["model"].split("."),
            f"{row['macs']:.3f}" if "macs" in row else "",
            f"{row['relative_l2']:.1e}" if "relative_l2" in row else "",
            f"{row['free']} of {row['groups']}" if "free" in row else "",
            row.get("error", "PASS" if row["passed"] else "FAIL"),
        )
        for row in facts["models"]
    ]
    head = ("topology", "exporter", "MACs left", "relative L2 to the masked original", "groups that may be cut", "")
    commit = f" at {facts['revision']}" if facts["revision"] else ""
    passed = len(facts["models"]) - len(facts["failed"])
    return (
        f"Measured {facts['environment']['date'][:10]}{commit} by "
        f"`python benchmarks/pruning_coverage.py check FOLDER`: "
        f"{passed} of {len(facts['models'])} exports with random weights reach {facts['aim']:g} of their "
        f"multiply-accumulates, random channels gone, and equal their masked original to {facts['tolerance']:g} "
        f"(Swin may decline).\n\n{table(head, cells, aligned=False)}\n"
    )


def line(row: dict[str, Any]) -> str:
    """One line of the table."""
    if "error" in row:
        return f"{row['model']:32} FAIL {row['error']}"
    return (
        f"{row['model']:32} {'PASS' if row['passed'] else 'FAIL'} MACs {row['macs']:.3f}  relative L2 "
        f"{row['relative_l2']:.1e}  {row['free']} of {row['groups']} groups, {row['channels']} channels, "
        f"coupled in {row['seconds']:.2f} s"
    )


def main() -> int:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("step", choices=("export", "check"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", help="part of a file name")
    parser.add_argument("--output", type=Path, help="write the JSON of a check here, and its table beside it, as .md")
    parser.add_argument("--verbose", action="store_true", help="list the groups, show tracebacks")
    arguments = parser.parse_args()
    if arguments.step == "export":
        return export(arguments.folder, arguments.only)
    return check(arguments.folder, arguments.only, arguments.verbose, arguments.output)


if __name__ == "__main__":
    sys.exit(main())
