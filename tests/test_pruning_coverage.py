"""The coverage script's second step, on small files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import onnx
from models import BY_NAME, Net, image

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "pruning_coverage.py"


def check(folder: Path) -> tuple[int, dict[str, object]]:
    done = subprocess.run([sys.executable, SCRIPT, "check", folder], capture_output=True, text=True, check=False)
    assert not done.stderr, done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


def free() -> onnx.ModelProto:
    net = Net()
    x = net.conv(image(net, size=16), 3, 16, bias=True)
    net.conv(net.add("Relu", net.conv(net.add("Relu", x), 16, 16, bias=True)), 16, 4, to="y")
    net.output("y", ["N", 4, 16, 16])
    return net.model()


def test_what_passes_and_what_does_not(tmp_path: Path) -> None:
    onnx.save(free(), tmp_path / "free.onnx")
    code, facts = check(tmp_path)
    assert (code, facts["failed"]) == (0, [])
    onnx.save(BY_NAME["output_in_the_middle"].build(), tmp_path / "pinned.onnx")
    code, facts = check(tmp_path)
    assert (code, facts["failed"]) == (1, ["pinned"])
    passed, pinned = facts["models"]  # type: ignore[misc]
    assert passed["macs"] <= 0.75
    assert passed["relative_l2"] <= 1e-5 < passed["changed"]
    assert pinned["reasons"] == ["'features' is a graph output", "'y' is a graph output"]
