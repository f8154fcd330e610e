"""The benchmark script: what it says of its numbers, what it keeps of earlier runs, and that every part runs."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import benchmark
from bench import architectures, engine, kept, peak, report, scale, setup, speed
from bench.report import NOT_MEASURED, Row

# Parameters of the published weights.
PUBLISHED = {
    "sd15": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sdxl": {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", architectures.NAMES)
def test_the_random_models_have_the_published_sizes(name):
    with torch.device("meta"):
        networks = architectures.networks(name, architectures.tokenizer())
    assert {part: sum(p.numel() for p in net.parameters()) for part, net in networks.items()} == PUBLISHED[name]


def test_the_median_is_held_against_the_target():
    assert Row("a", "b", [3.0, 5.0, 4.0], "x", at_least=4).line() == "| a | b | at least 4x | 4x (3 to 5) | pass |"
    assert Row("a", "b", [3.0, 5.0, 3.9], "x", at_least=4).verdict == "**short**"
    assert Row("a", "b", [1.0, 1.04, 1.2], "x", at_most=1.03).verdict == "**short**"
    assert Row("a", "b", [1.03], "x", at_most=1.03).verdict == "pass"
    assert Row("a", "b", [2.0]).verdict == ""
    assert Row("a", "b", at_least=4).line() == f"| a | b | at least 4 | {NOT_MEASURED} |  |"


def test_sides_take_turns_and_ratios_are_pair_by_pair():
    order = []

    def side(name, values):
        def measure():
            order.append(name)
            return next(values)

        return measure

    found = report.alternate(3, {"a": side("a", iter([1.0, 2.0, 9.0])), "b": side("b", iter([2.0, 8.0, 3.0]))})
    assert "".join(order) == "abbaab"
    assert report.ratios(found["a"], found["b"]) == [0.5, 0.25, 3.0]


def test_a_partial_run_keeps_the_rest_of_the_document(tmp_path):
    out = tmp_path / "docs" / "benchmarks.md"
    gpu, cpu = "End to end against a plain loop: SDXL-size, GPU", "Planning a large study: CPU"
    measured = report.section(gpu, "A note.", "some GPU", "the command", [Row("a", "b", [2.7], "x", at_least=2.5)])
    benchmark.write(out, gpu, measured)
    assert "python scripts/benchmark.py planning --device cpu" in out.read_text()
    out.write_text(out.read_text() + "\n## By hand\n\nKept.\n")
    benchmark.write(out, cpu, report.section(cpu, "", "a CPU", "another", [Row("c", "d", [1.0])]))
    text = out.read_text()
    assert measured in text and "| c | d |  | 1 |  |" in text and text.endswith("## By hand\n\nKept.\n")
    assert "python scripts/benchmark.py planning --device cpu" not in text  # it has been measured
    assert text.count("## ") == len(benchmark.pending()) + 1
    assert text.index("## End to end") < text.index(f"## {cpu}") < text.index("## By hand")  # in the usual order
    again = report.section(gpu, "", "a faster GPU", "the command", [Row("a", "b", [3.1], "x", at_least=2.5)])
    benchmark.write(out, gpu, again)
    assert again in out.read_text() and "some GPU" not in out.read_text()
    assert out.read_text().count(NOT_MEASURED) == len(benchmark.pending()) - 2


def test_every_target_is_pending_until_measured():
    text = "".join(benchmark.pending().values())
    for target in ("3.3x", "4x", "2.5x", "1.03x", "0.88x", "0.6x", "10 s", "5 s", "1.05x", "45%"):
        assert f" {target} | {NOT_MEASURED}" in text
    assert f"at most 1.05x | {NOT_MEASURED}" in text


def test_a_wrong_request_is_refused(capsys):
    for wrong in (["fast"], ["speed", "--repeats", "0"], ["speed", "--device", "abacus"]):
        with pytest.raises(SystemExit) as end:
            benchmark.main(wrong)
        assert end.value.code == 2
    assert "unknown part 'fast'; choose from speed, overhead" in capsys.readouterr().err


@pytest.fixture(autouse=True)
def loud_again():
    """The script quietens lesion's log for its whole process; the tests after it want to read it."""
    log = logging.getLogger("lesion")
    level = log.level
    yield
    log.setLevel(level)


def test_what_gradients_keep_is_counted_without_computing_it():
    """By hand; and of real calls, which keep what the count on no device says."""
    given = torch.ones(3, 5, requires_grad=True)
    linear = torch.nn.Linear(5, 7).requires_grad_(False)
    gelu = torch.nn.GELU()
    assert kept.kept(lambda: gelu(linear(given)), linear) == 3 * 7 * 4  # what goes into the GELU
    assert kept.kept(lambda: linear(given), linear) == 0  # the weight alone
    for size in (kept.Size("embedded", 64), kept.Size("sd3", 128, small=True), kept.Size("flux", 128, small=True)):
        denoiser = size.denoiser("cpu")
        real = kept.kept(kept.Call(size, denoiser), denoiser)
        assert kept.counted(size)[0] == pytest.approx(real, rel=0.01), size
    embedded = kept.Size("embedded", 64)
    decoder, latents = embedded.decoder("cpu")
    real = kept.kept(lambda: decoder(latents), decoder)
    assert kept.counted(embedded)[1] == pytest.approx(real, rel=0.01)
    assert kept.counted(kept.Size("sd15", 128, small=True))[0] > kept.counted(kept.Size("sd15", 64, small=True))[0] > 0


def test_operations_are_counted_as_by_hand_and_each_is_run_alone():
    """Two operations a multiplication; of attention both products, which torch's counter leaves out on a CPU."""
    rows, tokens, width = 3, 5, 8
    linear, conv = torch.nn.Linear(width, 2 * width), torch.nn.Conv2d(2, 4, 3, padding=1)

    def call(x, image):
        y = linear(x).chunk(2, dim=-1)[0].unsqueeze(1)
        return torch.nn.functional.scaled_dot_product_attention(y, y, y), conv(image), conv(image)

    products = 2 * rows * tokens * width * 2 * width
    attention = 2 * 2 * rows * tokens * tokens * width
    convolutions = 2 * (2 * rows * 4 * 6 * 6 * 2 * 9)
    given = torch.randn(rows, tokens, width), torch.randn(rows, 2, 6, 6)
    assert peak.operations(lambda: call(*given)) == products + attention + convolutions
    found = peak.alone(peak.Call(call, given, {}), least=0.0)
    assert {kind: one.operations for kind, one in found.items()} == {
        "products": products,
        "attention": attention,
        "convolutions": convolutions,
    }
    assert all(one.seconds > 0 for one in found.values())


@pytest.mark.slow
def test_the_share_of_the_peak_and_what_could_raise_it(tmp_path):
    given = replace(options(tmp_path), dtype="float32")
    _, rows = peak.peak(setup.setup("embedded", given), given)
    found = {row.name: row for row in rows}
    assert all(row.values and min(row.values) > 0 for row in rows)
    assert {"share, float32", "batches of 2, float32", "channels_last, float32"} <= found.keys()
    (call,), (share,) = found["call, float32"].values, found["share, float32"].values
    peaks = [row.values[0] for row in rows if row.what == "peak"]
    operations = float(found["call, float32"].what.split(" GFLOP")[0])
    assert share == pytest.approx(100 * operations / call / max(peaks), rel=1e-3)
    parts = [float(row.what.split("%")[0].split()[-1]) for row in rows if row.what.startswith("alone")]
    assert len(parts) == 3 and sum(parts) == pytest.approx(100, abs=0.1)


@pytest.mark.parametrize("side", [64, 72, 1024])
def test_large_images_are_not_read_by_the_toy_worlds_reader(side):
    """It takes minutes for one of 1024 px."""
    this = setup.Setup("embedded", setup.EMBEDDED, "cpu", "float32", 2, 1.0, side, 4, 2, 2)
    metrics = setup.request(this.overrides(2)).scorer.metrics
    assert any(name.startswith("read_") for name in metrics) is (side == 64)
    assert {"clip_similarity", "clip_text", "ssim", "psnr"} <= {*metrics}


@pytest.mark.slow
def test_every_part_runs_on_a_cpu(tmp_path, capfd, no_report):
    out = tmp_path / "benchmarks.md"
    assert benchmark.main(["--quick", "--device", "cpu", "--out", str(out)]) == 0, capfd.readouterr().err
    sections = out.read_text().split("\n## ")[1:]
    for case in benchmark.cases(benchmark.usual_parts("cpu"), "cpu", []):
        (text,) = [section for section in sections if section.startswith(case.title)]
        assert "Machine: " in text and f"`python scripts/benchmark.py {case.part} " in text
        assert NOT_MEASURED not in text
    lacking = {section.split("\n")[0] for section in sections if NOT_MEASURED in section}
    on_gpu = {case.title for case in benchmark.cases(benchmark.usual_parts("cuda"), "cuda", [])}
    assert lacking == on_gpu | {benchmark.PROVED, benchmark.EMBEDDED, benchmark.FLUX, benchmark.DECODERS}


def options(folder: Path) -> setup.Options:
    return setup.Options(device="cpu", repeats=1, quick=True, scratch=folder, kept=folder / "models")


@pytest.mark.slow
@pytest.mark.parametrize("name", architectures.NAMES)
def test_the_big_architectures_run_when_shrunk(name, tmp_path):
    this = setup.setup(name, options(tmp_path))
    _, rows = speed.overhead(this, options(tmp_path))
    assert [len(row.values) for row in rows] == [1, 1, 1]
    _, rows = engine.share(this, options(tmp_path))
    shares = [row.values[0] for row in rows if row.unit == "%"]
    assert len(shares) == 2 and all(share > 0 for share in shares)


def test_the_plain_loop_lesions_and_cleans_up(tmp_path, monkeypatch):
    this = setup.setup("sd15", options(tmp_path))
    pipe = setup.plain(this)
    silence, seen = speed.silence, []

    def counted(module, args, output):
        seen.append(module)
        return silence(module, args, output)

    monkeypatch.setattr(speed, "silence", counted)
    assert speed.plain_loop(pipe, this, [("a red circle", 0), ("two stars", 3)], images=3, steps=2) > 0
    sites = [module for path, module in pipe.unet.named_modules() if path.endswith("attn2")]
    assert len(sites) == 16 and not any(site._forward_hooks for site in sites)
    # A baseline, the first leave-one-out and the last only-one; PNDM calls the denoiser steps + 1 times.
    assert len(seen) == 3 * (1 + 15) and len(set(seen)) == 15
    assert not silence(None, None, torch.ones(2, 3)).any()


def test_a_child_that_fails_says_why(tmp_path):
    with pytest.raises(RuntimeError, match="unexpected keyword argument 'colour'"):
        scale.child("plan", colour="red")
