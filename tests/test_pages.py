"""Pages: what they say, that names from outside stay text, and that a real browser draws them whole."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from small_cnn import logits, write_data, write_model

from onnxcompress.cli import cli
from onnxcompress.errors import RuntimeUnavailableError, UsageError
from onnxcompress.pages import benchmark_document, check_page, compress_document, render_page, to_html, to_markdown
from onnxcompress.pages.document import Code, Document, Figure, Section, Table, Text, Tile, Tiles
from onnxcompress.pages.plots import (
    Point,
    Spread,
    bars,
    distributions,
    lines,
    pareto,
    ratios,
    scatter,
    shorten,
    stacked,
)

pytest.importorskip("matplotlib", reason="plots need the extra report")

EVIL = "<script>alert(1)</script>&\"'|`*_$x^2$\x1b[2J\n# no heading"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, data with labels, and the report and pages of both commands on them."""
    path = tmp_path_factory.mktemp("pages")
    model = write_model(path / "model.onnx")
    write_data(path / "data.npz")
    plain = write_data(path / "plain.npz", 40, seed=2)
    write_data(path / "eval.npz", 40, seed=2, labels=logits(model, plain).argmax(1))
    run("compress MODEL --data data.npz --eval-data eval.npz -o small.onnx --max-drop 50 --benchmark-seconds 0.2", path)
    return path


def run(line: str, folder: Path) -> None:
    """A command line on the files in ``folder``, with its report and both pages."""
    names = {"MODEL", "SMALL", "data.npz", "eval.npz", "small.onnx"}
    command = line.split()[0]
    words = [*line.split(), "--page", f"{command}.html", "--page", f"{command}.md", "--report", f"{command}.json"]
    known = {"MODEL": "model.onnx", "SMALL": "small.onnx"}
    outputs = (".html", ".md", ".json")
    words = [str(folder / known.get(word, word)) if word in names or word.endswith(outputs) else word for word in words]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def benchmarked(folder: Path) -> Path:
    run(
        "benchmark MODEL SMALL --data eval.npz --batch 1 --seconds 0.2 --sessions 6 --cold-starts 1 "
        "--throughput-batches 1,2 --runtime onnxruntime:cpu --runtime onnxruntime:cpu,optimization=basic",
        folder,
    )
    return folder


def report(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text())
    return data


PLOTS = {
    "compress.html": {"Accuracy against latency", "Latency distributions", "Time per operator"},
    "benchmark.html": {
        "Accuracy against latency",
        "Cold start",
        "Latency distributions",
        "Speed against the reference",
        "Throughput by batch size",
        "Time per operator",
    },
}


def test_a_compression_is_told_from_top_to_bottom(folder: Path) -> None:
    page = (folder / "compress.html").read_text()
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert titles[0] == "Summary"
    for title in ("Before and after", "Accuracy and latency", "Time per operator, before and after", "Recipe"):
        assert title in titles
    assert titles[-1] == "Environment"
    facts = report(folder / "compress.json")
    assert f"{facts['benchmark']['ratio']:.2f}x" in page
    assert "Accuracy budget met: top-1" in page
    assert "insert_qdq" in page
    assert facts["traces"].keys() == {"original", "result"}
    assert "QLinearConv" in page


def test_a_benchmark_is_told_with_its_failures_and_noise(benchmarked: Path) -> None:
    page = (benchmarked / "benchmark.html").read_text()
    facts = report(benchmarked / "benchmark.json")
    for comparison in facts["comparisons"]:
        if comparison["kind"] != "noise":
            assert f"{comparison['ratio']:.2f}x [{comparison['low']:.2f}, {comparison['high']:.2f}]" in page
    assert "Noise floor" in page
    assert "top-1" in page
    facts["output_check"] = False
    failure = {"error": "ModelError", "message": "the reason why", "exit_code": 3}
    facts["variants"][3] |= {"timing": None, "failure": failure}
    facts["comparisons"] = [c for c in facts["comparisons"] if c["candidate_variant"] != 3]
    told = to_html(benchmark_document(facts), "")
    assert "Outputs were not checked" in told
    assert "the reason why" in told
    assert "not timed" in told


def test_throughput_is_drawn_by_threads_where_there_is_one_batch(benchmarked: Path) -> None:
    facts = report(benchmarked / "benchmark.json")
    for variant in facts["variants"]:
        one = variant["throughput"][0]
        variant["throughput"] = [one | {"threads": 1}, one | {"threads": 2, "samples_per_second": 12345.6}]

    def drawn() -> set[str]:
        (section,) = [s for s in benchmark_document(facts).sections if s.title == "Throughput"]
        return {block.title for block in section.blocks if isinstance(block, Figure)}

    assert drawn() == {"Throughput by threads"}
    assert "12346" in to_html(benchmark_document(facts), ""), "in full, without an exponent"
    facts["variants"][0]["throughput"][0]["threads"] = 0
    assert drawn() == set(), "as many as the runtime likes is no place on an axis"


def test_the_widest_noise_floor_is_the_one_in_the_summary(benchmarked: Path) -> None:
    facts = report(benchmarked / "benchmark.json")
    noise = [c for c in facts["comparisons"] if c["kind"] == "noise"]
    assert len(noise) == 2
    noise[1] |= {"low": 0.5, "high": 1.7}
    label = facts["variants"][noise[1]["candidate_variant"]]["label"]
    assert f"0.500 to 1.700: {label} against itself" in to_html(benchmark_document(facts), "")


def test_markdown_says_the_same_without_plots(benchmarked: Path) -> None:
    for name in ("compress", "benchmark"):
        page = (benchmarked / f"{name}.md").read_text()
        assert page.startswith("# ")
        assert "## Summary" in page
        assert "## Environment" in page
        assert "<" not in re.sub(r"\\<", "", page)
        for table in re.findall(r"(?:^\|.*\n)+", page, re.M):
            cells = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
            assert len(cells) == 1, table


def test_pages_are_the_same_for_the_same_report(benchmarked: Path) -> None:
    facts = report(benchmarked / "benchmark.json")
    page = render_page("x.html", benchmark_document(facts), facts["tool"])
    assert page == render_page("x.html", benchmark_document(facts), facts["tool"])
    assert page == (benchmarked / "benchmark.html").read_text()


@pytest.mark.parametrize("name", ["compress.html", "benchmark.html"])
def test_a_page_needs_nothing_else(benchmarked: Path, name: str) -> None:
    page = (benchmarked / name).read_text()
    assert "<script" not in page
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!#)""", page), "nothing is loaded from elsewhere"
    assert not re.findall(r"url\((?!#)", page)
    ids = re.findall(r'<(?:clipPath|path|pattern)[^>]* id="([^"]+)"', page)
    assert len(ids) == len(set(ids)), "what one plot defines is not taken for another's"
    assert len(page) < 1_000_000


# ----------------------------------------------------------------------------------------------------------------------
# Names from outside


def evil_document() -> Document:
    figures = (
        ratios(EVIL, EVIL, [Spread(EVIL, 1.0, 0.9, 1.1)], (0.99, 1.01)),
        scatter("a", "", [Point(EVIL, 0.1, 1.0), Point("漢字", 0.2, 2.0)], EVIL),
        distributions("b", "", [(EVIL, [0.1, 0.2, 0.3], [1, 2, 3], 0.2)]),
        bars("c", "", {EVIL: [1.0, None]}, [EVIL, "y"], EVIL),
        stacked("d", "", {EVIL: [1.0, 2.0]}, [EVIL, "y"], EVIL),
        lines("e", "", {EVIL: [(1, 2.0), (4, 3.0)]}, EVIL, EVIL),
    )
    blocks = (Tiles((Tile(EVIL, EVIL, EVIL),)), Table((EVIL, "b"), ((EVIL, EVIL),), EVIL), Text(EVIL, "bad"))
    return Document(EVIL, EVIL, (Section(EVIL, (*blocks, Code(f"a: 1\n```\n{EVIL}"), *figures)),))


def test_names_are_never_markup_in_html() -> None:
    page = to_html(evil_document(), EVIL)
    assert "<script" not in page
    assert "\x1b" not in page
    assert page.count("&lt;script&gt;") > 10
    tags = set(re.findall(r"<([a-zA-Z]+)", page))
    assert "script" not in tags


def test_names_are_never_markup_in_markdown() -> None:
    page = to_markdown(evil_document(), EVIL)
    outside = re.sub(r"^````\n.*?^````$", "", page, flags=re.S | re.M)
    assert outside != page, "a fence is longer than any in the code"
    assert not re.findall(r"(?<!\\)[<>`$]", outside)
    assert len(re.findall(r"^#", outside, re.M)) == 2, "the title and the section"
    assert "\x1b" not in page


def test_long_names_keep_their_ends() -> None:
    assert shorten("short") == "short"
    found = shorten("/model/encoder/layer.11/attention/self/query/MatMul")
    assert len(found) == 30
    assert found.startswith("/model/en")
    assert found.endswith("/query/MatMul")


# ----------------------------------------------------------------------------------------------------------------------
# Parts


def test_the_front_is_what_nothing_beats() -> None:
    points = [Point("slow", 3, 9), Point("bad", 2, 4), Point("fast", 1, 5), Point("equal", 1, 3), Point("worse", 4, 9)]
    assert [point.label for point in pareto(points)] == ["fast", "slow"]


def test_sensitivity_pruning_and_returned_layers_are_shown_where_a_report_has_them(folder: Path) -> None:
    facts = report(folder / "compress.json")
    layers = [{"node": f"layer{i}", "op": "Conv", "macs": 10, "sqnr_db": 20.0 + i, "gain_db": 1.0} for i in range(3)]
    facts["sensitivity"] = {"layers": [*layers, {**layers[0], "sqnr_db": None}], "sqnr_db": 18.0, "samples": 4}
    step = {"floats": ["layer0"], "macs": 10, "sqnr_before_db": 12.0, "sqnr_after_db": None, "why": "a wide range"}
    facts["search"] = {
        "returned": [step],
        "sensitivity": [{"kind": "tensor", "name": "/act/Mul_output_0", "alone_sqnr_db": 7.5}],
    }
    facts["islands"] = {
        "comparisons": [{"nodes": ["/act/Mul"], "ratio": 1.25, "low": 1.2, "high": 1.3}],
        "returned": [],
    }
    facts["passes"][0]["details"]["channels"] = [{"node": "layer1", "before": 16, "after": 12}]
    facts["passes"][1]["changes"] = [{"kind": "pruned", "node": "layer2", "detail": "8 of 32 channels stay"}]
    facts["audit"]["floats"] = [{"node": "n", "operator": "Softmax", "reason": "no integer kernel"}]
    document = compress_document(facts, "version: 1")
    by_title = {section.title: section.blocks for section in document.sections}
    figures = {block.title for blocks in by_title.values() for block in blocks if isinstance(block, Figure)}
    assert {"The most sensitive layers", "Channels per layer"} <= figures
    page = to_html(document, "")
    assert "a wide range" in page
    assert "/act/Mul_output_0" in page
    assert "1.25x [1.20, 1.30]" in page
    assert "25 %" in page
    assert "75 %" in page
    assert "no integer kernel" in page


def test_a_missed_budget_and_a_missing_benchmark_are_told(folder: Path) -> None:
    facts = report(folder / "compress.json")
    facts |= {"benchmark": None, "output": None, "failure": "top-1 fell", "metrics": [], "traces": {}}
    facts["budget"] = {"basis": "SQNR", "limit": 10.0, "found": 3.0, "met": False}
    page = to_html(compress_document(facts, ""), "")
    assert "nothing was written: top-1 fell" in page
    assert "Accuracy budget missed: SQNR, 3.00 dB kept of the 10.00 asked for." in page
    assert "Not timed." in page
    for basis, met, text in (
        ("SQNR", True, "Accuracy budget met: SQNR, the outputs are equal, 10.00 dB asked for."),
        ("SQNR", False, "Accuracy budget missed: SQNR, no number kept of the 10.00 asked for."),
        ("agreement", False, "Accuracy budget missed: agreement, no number points lost of 10.00 allowed."),
    ):
        facts["budget"] = {"basis": basis, "limit": 10.0, "found": None, "met": met}
        assert text in to_html(compress_document(facts, ""), "")


def test_what_no_page_can_be_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_page("a.html")
    with pytest.raises(UsageError, match=r"a page ends in \.html"):
        check_page(tmp_path / "page.pdf")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(RuntimeUnavailableError, match=r"onnxcompress\[report\]"):
        check_page("a.html")
    check_page("a.md")


# ----------------------------------------------------------------------------------------------------------------------
# A real browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr"),
)

#: finds out what was drawn and leaves it in the page
PROBE = """<script>
addEventListener("load", () => {
  const plots = [...document.querySelectorAll("svg")].map(svg => {
    const box = svg.getBoundingClientRect();
    const shapes = [...svg.querySelectorAll("path, use")].filter(s => {
      const b = s.getBoundingClientRect(); return b.width + b.height > 0; });
    const texts = [...svg.querySelectorAll("text")].map(t => t.getBoundingClientRect());
    return { label: svg.getAttribute("aria-label"), width: box.width, height: box.height, shapes: shapes.length,
      cut: texts.filter(t => t.left < box.left - 2 || t.right > box.right + 2 || t.bottom > box.bottom + 2).length };
  });
  const page = { plots, width: innerWidth,
    overflow: document.body.scrollWidth - document.documentElement.getBoundingClientRect().width };
  document.body.dataset.probe = JSON.stringify(page);
});
</script>"""


@pytest.fixture(scope="module")
def browser() -> str:
    found = next((path for path in map(shutil.which, BROWSERS) if path is not None), None)
    if found is None:
        pytest.skip(f"no browser is installed: none of {', '.join(BROWSERS)}")
    return found


@pytest.fixture
def browse(browser: str, tmp_path: Path) -> Iterator[Callable[..., tuple[str, str]]]:
    """Run the browser on a file with further arguments: (stdout, what the page wrote on its console)."""

    def run(file: Path, *arguments: str) -> tuple[str, str]:
        profile = tmp_path / f"profile-{len(list(tmp_path.glob('profile-*')))}"
        command = [browser, *QUIET, f"--user-data-dir={profile}", *arguments, file.as_uri()]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert answer.returncode == 0, answer.stderr[-2000:]
        console = "\n".join(line for line in answer.stderr.splitlines() if "CONSOLE" in line)
        return answer.stdout, console

    yield run
    for profile in tmp_path.glob("profile-*"):
        shutil.rmtree(profile, ignore_errors=True)


@pytest.mark.parametrize("width", [1280, 360], ids=["desktop", "phone"])
@pytest.mark.parametrize("name", ["compress.html", "benchmark.html"])
def test_a_browser_draws_every_plot(
    benchmarked: Path, browse: Callable[..., tuple[str, str]], tmp_path: Path, name: str, width: int
) -> None:
    page = (benchmarked / name).read_text()
    probed = tmp_path / name  # the page's own policy forbids scripts, this one's too
    # A window is never as narrow as a telephone, but the same style applies up to 640 pixels.
    probe = f"<style>html {{ width: {width}px }}</style>{PROBE}</body>"
    probed.write_text(re.sub(r"<meta http-equiv=.*?>", "", page).replace("</body>", probe))
    dom, console = browse(probed, f"--window-size={max(width, 500)},2000", "--dump-dom")
    assert not console
    found = re.search(r'data-probe="([^"]*)"', dom)
    assert found is not None
    facts = json.loads(html.unescape(found[1]))
    assert facts["width"] == max(width, 500)
    assert facts["overflow"] <= 0, "nothing is wider than the window"
    assert {plot["label"].partition(". ")[0] for plot in facts["plots"]} == PLOTS[name]
    for plot in facts["plots"]:
        assert plot["width"] > min(width, 600) * 0.6, plot
        assert plot["height"] > 60, plot
        assert plot["shapes"] > 10, plot
        assert plot["cut"] == 0, plot


def test_a_median_at_the_edge_keeps_its_label(browse: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    figure = distributions("d", "", [("left", [1.0, 2.0, 3.0], [1, 2, 0], 0.1), ("right", [1.0, 2.0], [3, 1], 5.0)])
    file = tmp_path / "edge.html"
    page = to_html(Document("t", "", (Section("s", (figure,)),)), "")
    file.write_text(re.sub(r"<meta http-equiv=.*?>", "", page).replace("</body>", f"{PROBE}</body>"))
    dom, _ = browse(file, "--dump-dom")
    found = re.search(r'data-probe="([^"]*)"', dom)
    assert found is not None
    (plot,) = json.loads(html.unescape(found[1]))["plots"]
    assert plot["cut"] == 0


def test_a_browser_runs_nothing_that_a_name_says(browse: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    file = tmp_path / "evil.html"
    file.write_text(to_html(evil_document(), EVIL))
    dom, console = browse(file, "--dump-dom")
    assert not console
    assert "<script>alert" not in dom


def test_a_browser_shows_and_prints_it(
    benchmarked: Path, browse: Callable[..., tuple[str, str]], tmp_path: Path
) -> None:
    image = pytest.importorskip("PIL.Image", reason="looking at a screenshot needs Pillow")
    _, console = browse(benchmarked / "benchmark.html", "--window-size=1280,3000", f"--screenshot={tmp_path / 's.png'}")
    assert not console
    with image.open(tmp_path / "s.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    colours = {tuple(colour) for colour in np.unique(pixels[::7], axis=0).tolist()}
    assert len(colours) > 50
    assert (0, 114, 178) in colours, "the first colour of the plots"
    browse(benchmarked / "benchmark.html", "--no-pdf-header-footer", f"--print-to-pdf={tmp_path / 'p.pdf'}")
    assert (tmp_path / "p.pdf").read_bytes().startswith(b"%PDF")
    assert (tmp_path / "p.pdf").stat().st_size > 20_000
