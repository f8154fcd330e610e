"""Memory that does not suffice: what failed is let go of before the next try, and costs only its own cells."""

from __future__ import annotations

import subprocess
import sys
import threading
import weakref
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline

from conftest import settings, tiny_spec
from lesion import models, replacements
from lesion.errors import RequestError
from lesion.generation import decoding
from lesion.generation.generate import generate, to_pixels
from lesion.models import loading, memory, precision
from lesion.run import maker as making
from lesion.run.maker import Maker
from lesion.scoring import Scorer, Shot
from lesion.scoring._pixels import batches
from lesion.store.images import Store
from lesion.study.capture import Capture
from lesion.study.grid import Cell, ModelIdentity
from lesion.study.layers import Layers
from lesion.study.lesions import Lesion, Replacement
from lesion.study.prompts import Prompt

IDENTITY = ModelIdentity("tiny", "f00d", "float32")


@pytest.fixture
def maker(tmp_path):
    """Of a study of nothing but mean lesions, at a batch size of 8 that was asked for."""
    lesion = Lesion("leave_one_out", "a", ("a",), Replacement("mean"))
    request = SimpleNamespace(
        model="spec", device="cpu", replacements={"mean": {}}, layers=Layers("attention", "cross_attention")
    )
    study = SimpleNamespace(
        model=IDENTITY, settings=settings(batch_size=8), prompts=(Prompt("a"),), begins=(), lesions=lambda: [lesion]
    )
    return Maker(request, SimpleNamespace(identity=IDENTITY, unseen={}), study, Store(tmp_path), lambda *args: None)


class Crowded:
    """A device that holds `most` images. tried: batch sizes; alive: of each try, what earlier ones left behind."""

    def __init__(self, most):
        self.most, self.tried, self.alive, self.held = most, [], [], []

    def __call__(self, number):
        self.tried.append(number)
        self.alive.append(sum(one() is not None for one in self.held))
        activation = torch.zeros(number)
        cycle = [activation]
        cycle.append(cycle)  # as modules and hooks make them
        self.held.append(weakref.ref(activation))
        if number > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return number


def test_a_failed_batch_is_let_go_of_before_it_is_tried_again(maker, monkeypatch):
    device, done = Crowded(2), []
    monkeypatch.setattr(making, "generate", lambda model, cells, *rest: device(len(cells)) and cells)
    batch = [Cell(IDENTITY, Prompt("a"), seed, settings(), None) for seed in range(8)]
    maker._make(
        batch, SimpleNamespace(put=lambda cells, *rest: done.extend(cells), drain=lambda: False), SimpleNamespace()
    )
    assert done == batch
    assert device.tried == [8, 4, 2, 2, 2, 2]
    assert device.alive[:3] == [0, 0, 0]


def test_scoring_in_flight_is_waited_for_before_a_batch_is_halved(maker, monkeypatch):
    """Scores of earlier batches share the card: what did not fit beside them may fit afterwards."""
    device, done, waiting = Crowded(4), [], [True]

    def drained() -> bool:
        device.most = 8
        return bool(waiting) and waiting.pop()

    monkeypatch.setattr(making, "generate", lambda model, cells, *rest: device(len(cells)) and cells)
    batch = [Cell(IDENTITY, Prompt("a"), seed, settings(), None) for seed in range(8)]
    shelf = SimpleNamespace(put=lambda cells, *rest: done.extend(cells), drain=drained)
    maker._make(batch, shelf, SimpleNamespace())
    assert (done, device.tried, maker.size) == (batch, [8, 8], 8)


def test_images_of_a_batch_are_written_by_several_threads_and_told_in_order(maker, monkeypatch):
    together, told = threading.Barrier(2), []
    batch = [Cell(IDENTITY, Prompt("a"), seed, settings(), None) for seed in range(4)]

    def put(cell, *facts):
        together.wait(timeout=20)  # one alone would wait in vain
        if cell.seed == 2:
            raise OSError("disk full")
        return f"picture {cell.seed}"

    monkeypatch.setattr(maker.store, "put", put)
    maker.made = lambda cell, pixels, picture: told.append(picture)
    released = []
    claims = SimpleNamespace(release=lambda keys: released.extend(keys))
    maker._put(batch, np.full((4, 16, 16, 3), 9, np.uint8), None, claims)
    assert told == ["picture 0", "picture 1", "picture 3"]
    assert released == [cell.key for cell in batch] and list(maker.failures) == [batch[2].key]


def test_a_lost_card_stops_the_job_at_once(maker, monkeypatch):
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    tried = []

    def lost(*args):
        tried.append(args)
        raise error

    monkeypatch.setattr(making, "generate", lost)
    batch = [Cell(IDENTITY, Prompt("a"), seed, settings(), None) for seed in range(8)]
    with pytest.raises(RuntimeError, match="illegal memory access"):
        maker._make(batch, SimpleNamespace(drain=lambda: False), SimpleNamespace())
    assert len(tried) == 1 and not maker.failures
    with pytest.raises(RuntimeError, match="illegal memory access"):
        making._fitting(maker.request, maker.model, maker.study)
    monkeypatch.setattr(replacements, "build", lost)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        maker._prepare()
    with pytest.raises(RuntimeError, match="illegal memory access"):
        Scorer([type("Lost", (), {"name": "a", "identical": None, "__call__": lost})()]).score([1, 2])
    for said in ("device-side assert triggered", "uncorrectable NVLink error detected during the execution",
                 "operation not supported on global/shared address space", "the launch timed out and was terminated",
                 "CUDA-capable device(s) is/are busy or unavailable", "unknown error"):  # fmt: skip
        assert memory.lost(RuntimeError(f"CUDA error: {said}"))
    assert not memory.lost(RuntimeError("CUDA error: invalid configuration argument"))  # of a batch too large
    memory.raise_if_lost(RuntimeError("CUDA out of memory"))
    memory.raise_if_lost(ValueError("illegal memory access"))


def test_scores_that_do_not_fit_together_are_made_in_halves():
    class Narrow:
        name, identical = "narrow", None

        def __call__(self, shots):
            if len(shots) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return [shot.value for shot in shots]

    shots = [SimpleNamespace(value=float(number)) for number in range(7)]
    assert Scorer([Narrow()]).score(shots)["narrow"].tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_a_decoder_that_runs_out_of_memory_keeps_its_precision(tiny_sdxl_folder, monkeypatch):
    """diffusers decodes a float16 autoencoder of SDXL in float32, and casts it back only where that succeeds."""
    model = models.load(models.resolve(tiny_spec(tiny_sdxl_folder, dtype="float16")), "cpu")
    vae = model.pipe.vae
    vae.register_to_config(force_upcast=True)
    cell = Cell(model.identity, Prompt("a"), 0, settings(steps=1), None)
    before = generate(model, [cell], {})
    found = []

    def crowded(*args, **options):
        found.append(next(vae.parameters()).dtype)
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(vae.decoder, "forward", crowded)
        with pytest.raises(torch.OutOfMemoryError):
            generate(model, [cell], {})
    assert found == [torch.float32]  # it was in the middle of the decode
    assert {weight.dtype for weight in vae.parameters()} == {torch.float16}
    assert (generate(model, [cell], {}) == before).all()
    loading.forget()


def test_a_call_that_fails_leaves_no_offloaded_part_on_the_device(tiny_model, monkeypatch):
    """The pipeline itself sends them back only where it succeeds; the next call would find less memory."""
    cell, freed = Cell(tiny_model.identity, Prompt("a"), 0, settings(steps=1), None), []
    monkeypatch.setattr(tiny_model.pipe, "maybe_free_model_hooks", lambda: freed.append(1))
    generate(tiny_model, [cell], {})
    assert freed == [1]
    monkeypatch.setattr(tiny_model.denoiser, "forward", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(tiny_model, [cell], {})
    assert freed == [1, 1]


def test_a_batch_that_cannot_be_decoded_at_once_is_decoded_in_slices(tiny_model, monkeypatch):
    """What the denoising led to is kept: only the decode is done again, in halves, and what fitted is remembered."""
    cells = [Cell(tiny_model.identity, Prompt("a"), seed, settings(steps=2), None) for seed in range(5)]
    whole, vae, tried, denoised = generate(tiny_model, cells, {}), tiny_model.pipe.vae, [], []
    forward = vae.decoder.forward
    tiny_model.denoiser.register_forward_pre_hook(lambda *args: denoised.append(1))

    def crowded(z, *args, **options):
        tried.append(len(z))
        if len(z) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(z, *args, **options)

    monkeypatch.setattr(vae.decoder, "forward", crowded)
    again = generate(tiny_model, cells, {})
    assert (tried, len(denoised)) == ([5, 2, 2, 1], 2)
    assert abs(again - whole).max() < 1e-5
    tried.clear()
    generate(tiny_model, cells, {})
    assert tried == [2, 2, 1]
    monkeypatch.setattr(vae.decoder, "forward", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(tiny_model, cells, {})


def test_no_tensor_of_a_decoder_has_more_elements_than_an_index_can_name():
    sd = {"block_out_channels": (128, 256, 512, 512)}
    with torch.device("meta"):
        decoder = AutoencoderKL(**sd, up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4).decoder
    largest = []
    for module in decoder.modules():
        module.register_forward_hook(lambda module, args, output: largest.append(output.numel()))
    for side in (64, 128):
        decoder(torch.empty(1, 4, side, side, device="meta"))
        assert decoding.most_at_once(sd, (64, 4, side, side)) == (2**31 - 1) // max(largest)
    assert decoding.most_at_once({}, (9, 4, 8, 8)) == 9


def test_the_decoders_precision_is_a_switch_of_its_own(tiny_folder):
    """bfloat16 in the decode alone: latents stay as they are, and images are cells of their own."""
    found = {}
    for chosen in ("", "bfloat16"):
        loading.forget()
        model = models.load(models.resolve(tiny_spec(tiny_folder, decoder=chosen)), "cpu")
        images = generate(model, [Cell(model.identity, Prompt("a"), 0, settings(steps=2), None)], {})
        found[chosen] = images, model.identity.switches
    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    asked = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 16, "width": 16}
    latents = pipe("a", generator=torch.Generator().manual_seed(0), output_type="latent", **asked).images
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rough = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample.float()
    assert (found["bfloat16"][0] == pipe.image_processor.postprocess(rough, "np")).all()
    assert 0 < abs(found["bfloat16"][0] - found[""][0]).max() < 0.05
    assert [switches for _, switches in found.values()] == [(), ("decoder bfloat16",)]
    with pytest.raises(RequestError, match=r"performance.decoder: got 'fp4'; allowed: null, float32, tf32, bfloat16"):
        models.ModelSpec.of({"name": "a", "id": "b"}, {"decoder": "fp4"})
    loading.forget()


def test_a_float16_autoencoder_that_a_gpu_decodes_in_float32_is_decoded_as_torch_does(tiny_sdxl_folder, tiny_folder):
    """Known before there is a GPU, since it is part of what a cell is."""

    def switches(folder, device="cuda", **asked):
        source = models.resolve(tiny_spec(folder, **{"dtype": "auto", **asked}))
        source.vae_config["force_upcast"] = upcast
        return models.identity_of(source, device).switches

    upcast = True
    assert switches(tiny_sdxl_folder) == switches(tiny_sdxl_folder, "cuda:1") == ("decoder stock",)
    for asked in ({"dtype": "bfloat16"}, {"decoder": "float32"}):
        assert switches(tiny_sdxl_folder, **asked) == ()
    assert switches(tiny_sdxl_folder, decoder="tf32") == ("decoder tf32",)
    assert switches(tiny_sdxl_folder, tf32=True) == ("tf32",)
    assert switches(tiny_sdxl_folder, "cpu") == switches(tiny_folder) == ()
    upcast = False
    assert switches(tiny_sdxl_folder) == ()


def test_finished_images_leave_the_device_as_bytes(tiny_model):
    cells = [Cell(tiny_model.identity, Prompt("a"), seed, settings(steps=2), None) for seed in range(2)]
    rough, fine = generate(tiny_model, cells, {}, rounded=True), generate(tiny_model, cells, {})
    assert rough.dtype == np.uint8
    assert [to_pixels(image)[1] for image in rough] == ["", ""]
    assert (rough == np.stack([to_pixels(image)[0] for image in fine])).all()
    with torch.no_grad():
        tiny_model.pipe.vae.decoder.conv_out.bias.fill_(float("nan"))
    assert to_pixels(generate(tiny_model, cells, {}, rounded=True)[0])[1] == "image has non-finite values"


def test_large_images_are_scored_few_at_a_time():
    def sizes(side, number, most=32):
        pixels = np.zeros((side, side, 3), np.uint8)
        return [len(rows) for rows, *_ in batches([Shot("a", pixels, "b", pixels, "")] * number, most)]

    assert sizes(64, 40) == [32, 8]
    assert sizes(1024, 9) == [2, 2, 2, 2, 1]
    assert sizes(3000, 2) == [1, 1]


def test_auto_is_told_by_two_and_four_images(monkeypatch):
    """A single row takes other kernels than several, and less memory than its share."""
    monkeypatch.setattr(memory, "_peak", lambda work, device: work() and {2: 700, 4: 900}[device_made[-1]])
    monkeypatch.setattr(memory, "_free", lambda device: 2000)
    device_made = []
    assert memory.fitting(lambda number: device_made.append(number) or True, "cpu") == 8  # 500 + 100 n in 1700
    assert device_made == [1, 2, 2, 4]
    assert memory.fitting(Crowded(3), "cpu") == 2


def test_auto_counts_donors_and_maps(maker, monkeypatch):
    made = []
    monkeypatch.setattr(memory, "fitting", lambda make, device: make(4) and 8)
    monkeypatch.setattr(making, "Capturing", lambda model, cells, capture: (capture, len(cells)))
    monkeypatch.setattr(
        making, "generate", lambda model, cells, *rest: made.append((len(cells), rest[3])) or bool(cells)
    )
    assert making._fitting(maker.request, maker.model, maker.study) == 8
    assert making._fitting(maker.request, maker.model, maker.study, Capture()) == 8
    resampled = Lesion("leave_one_out", "a", ("a",), Replacement("resample", {"prompt": "a cat"}))
    maker.study.lesions = lambda: [resampled]
    assert making._fitting(maker.request, maker.model, maker.study) == 8
    assert made == [(4, None), (4, (Capture(), 4)), (8, None)]


def test_a_fault_that_looks_like_memory_stops_a_study_all_the_same(maker, monkeypatch):
    """cuDNN says "unable to find an engine" of both; a broken cuDNN must not be asked for every cell."""
    tried = []

    def broken(model, cells, *rest):
        tried.append(len(cells))
        raise RuntimeError("GET was unable to find an engine to execute this computation")

    monkeypatch.setattr(making, "generate", broken)
    cells = [Cell(IDENTITY, Prompt("a"), seed, settings(), None) for seed in range(64)]
    maker.study.prompts, maker.study.seeds = (Prompt("a"),), (99,)
    maker.study.cell = lambda prompt, seed, lesion: Cell(IDENTITY, prompt, seed, settings(), lesion)
    claims = SimpleNamespace(release=lambda keys: None)
    maker._make(cells[:8], SimpleNamespace(drain=lambda: False), claims)
    assert "unable to find an engine" in maker.stopped
    assert tried == [8, 4, 2, 1, 1, 1]


@pytest.mark.parametrize("new", [True, False])
def test_tf32_is_set_by_the_one_way_that_torch_has(new, monkeypatch):
    """torch 2.9 raises where `allow_tf32` and `fp32_precision` are mixed; before it has only the former."""
    if new:
        matmul, cudnn = (
            SimpleNamespace(fp32_precision="none"),
            SimpleNamespace(conv=SimpleNamespace(fp32_precision="none")),
        )
    else:
        matmul, cudnn = SimpleNamespace(allow_tf32=False), SimpleNamespace(allow_tf32=True)
    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    monkeypatch.setattr(torch.backends, "cudnn", cudnn)

    def now():
        return [dict(vars(matmul)), dict(vars(cudnn.conv if new else cudnn))]

    def full():
        with precision.full_float32():
            seen.append(now())

    seen: list[object] = []
    on, off = ("tf32", "ieee") if new else (True, False)
    name = "fp32_precision" if new else "allow_tf32"
    precision.set_tf32(True)
    assert now() == [{name: on}, {name: on}]
    with precision.full_float32():
        assert now() == [{name: off}, {name: off}]
    assert now() == [{name: on}, {name: on}]
    with precision.stock():
        assert now() == [{name: off}, {name: on}]
        other = Thread(target=full)  # what another thread would change waits
        other.start()
        other.join(0.1)
        assert seen == [] and now() == [{name: off}, {name: on}]
    other.join()
    assert seen == [[{name: off}, {name: off}]] and now() == [{name: on}, {name: on}]


@pytest.mark.parametrize("before", [True, False])
def test_tf32_under_the_torch_that_is_here(before):
    """Whatever a script has set by the old flags before."""
    code = f"""
import torch
from lesion.models import precision
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = {before}
for chosen in (precision.full_float32, precision.tf32, precision.stock):
    with chosen():
        print([getattr(one, name) == tf32 for one, name, tf32, full in precision._knobs()])
precision.set_tf32(True)
with precision.full_float32():
    pass
print([getattr(one, name) == tf32 for one, name, tf32, full in precision._knobs()])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    found = [[False, False], [True, True], [False, True], [True, True]]
    assert done.stdout.splitlines() == list(map(str, found)), done.stderr


def test_calibration_halves_the_batch_and_images_go_on_with_it(maker, monkeypatch):
    device = Crowded(2)
    monkeypatch.setattr(replacements, "build", lambda name, options, bench: device(bench.batch_size))
    maker._prepare()
    assert device.tried == [8, 4, 2]
    assert device.alive == [0, 0, 0]
    assert list(maker.interventions.values()) == [2]
    assert not maker.broken
    assert maker.size == 2


def test_calibration_that_does_not_fit_one_image_costs_its_own_cells(maker, monkeypatch):
    device = Crowded(0)
    monkeypatch.setattr(replacements, "build", lambda name, options, bench: device(bench.batch_size))
    maker._prepare()
    assert device.tried == [8, 4, 2, 1]
    assert not maker.interventions
    assert "mean could not be made ready: OutOfMemoryError: CUDA out of memory" in next(iter(maker.broken.values()))


def test_another_fault_of_a_replacement_is_not_tried_again(maker, monkeypatch):
    sizes = []

    def build(name, options, bench):
        sizes.append(bench.batch_size)
        raise ValueError("no such site")

    monkeypatch.setattr(replacements, "build", build)
    maker._prepare()
    assert sizes == [8]
    assert "no such site" in next(iter(maker.broken.values()))


@pytest.mark.parametrize("most", [0, 1])
def test_auto_is_one_where_one_or_two_do_not_fit(most):
    assert memory.fitting(Crowded(most), "cpu") == 1


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), ValueError("cannot identify image file")]
)
def test_auto_goes_on_where_the_first_image_cannot_be_made(cli, monkeypatch, error):
    def make(model, cells, *rest):
        if any(cell.prompt.text == "a red circle" for cell in cells):
            raise error
        return generate(model, cells, *rest)

    monkeypatch.setattr(making, "generate", make)
    code, _, err = cli("generation.batch_size=auto", "selection=none")
    assert code == 1
    assert "1 of 2 images" in err
    (frame,) = cli.frames()
    assert frame.status.tolist() == ["failed", "ok"]
    assert str(error) in frame.reason[0]


def test_auto_is_found_once_for_models_that_are_the_same(maker, monkeypatch):
    class Loaded(SimpleNamespace):  # `dataclasses.replace` makes a new one for each job and round
        pass

    probed, model = [], Loaded(identity=IDENTITY)
    monkeypatch.setattr(memory, "fitting", lambda make, device: probed.append(device) or 8)
    request = SimpleNamespace(model="spec", device="cuda:1")
    assert making._fitting(request, model, maker.study) == 8
    assert making._fitting(request, Loaded(identity=IDENTITY), maker.study) == 8
    assert probed == ["cuda:1"]  # that very one, not the first
    for other in ({"device": "cpu"}, {"model": "another"}):
        making._fitting(SimpleNamespace(**{**vars(request), **other}), model, maker.study)
    assert len(probed) == 3
    held = weakref.ref(model)
    del model
    assert held() is None


def test_auto_remembers_what_did_not_fit(maker, monkeypatch):
    monkeypatch.setattr(memory, "fitting", lambda make, device: 8)
    maker.study.settings = settings()  # batch_size=auto
    assert making._size(maker.request, maker.model, maker.study) == 8
    maker._shrink(8)
    assert making._size(maker.request, maker.model, maker.study) == 4


def test_a_size_that_was_asked_for_and_did_not_fit_is_not_tried_again(maker):
    """Each round of a budget has a maker of its own."""
    assert making._size(maker.request, maker.model, maker.study) == 8
    maker._shrink(8)
    assert making._size(maker.request, maker.model, maker.study) == 4
    maker.request.device = "cuda:1"
    assert making._size(maker.request, maker.model, maker.study) == 8


@pytest.mark.parametrize(
    ("said", "out"),
    [
        ("CUDA out of memory. Tried to allocate 2 GiB", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True),
        ("GET was unable to find an engine to execute this computation", True),
        ("CUDA error: device-side assert triggered", False),
    ],
)
def test_running_out_is_told_from_other_faults(said, out):
    assert memory.ran_out(RuntimeError(said)) is out


def test_a_fault_of_the_first_image_is_not_remembered(maker, monkeypatch):
    monkeypatch.setattr(making, "generate", lambda *args: 1 / 0)
    assert making._fitting(maker.request, maker.model, maker.study) == 1
    monkeypatch.setattr(memory, "fitting", lambda make, device: 8)
    assert making._fitting(maker.request, maker.model, maker.study) == 8


def test_a_model_goes_before_another_is_loaded(tiny_folder, monkeypatch):
    loading.forget()
    make, seen, held = loading._pipeline, [], []

    def noting(source, dtype):
        seen.append([one() is not None for one in held])
        return make(source, dtype)

    monkeypatch.setattr(loading, "_pipeline", noting)
    specs = [tiny_spec(tiny_folder, name=name) for name in ("one", "one", "another", "one")]
    for spec in specs:
        held.append(weakref.ref(models.load(models.resolve(spec), "cpu").denoiser))
    assert seen == [[], [False, False], [False, False, False]]  # loaded three times, each alone
    loading.forget()
