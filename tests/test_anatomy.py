"""Layer lists of the published architectures, built on the meta device, and of `lesion-inspect`."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from lesion import inspect
from lesion.anatomy import AnatomyError, examine

SD15 = {
    "sample_size": 64,
    "layers_per_block": 2,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SDXL = {
    "sample_size": 128,
    "layers_per_block": 2,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD15_PATHS = [
    *(f"down_blocks.{block}.attentions.{layer}" for block in range(3) for layer in range(2)),
    "mid_block.attentions.0",
    *(f"up_blocks.{block}.attentions.{layer}" for block in range(1, 4) for layer in range(3)),
]


def on_meta(config):
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(config)


def test_sd15_has_16_layers_of_one_site():
    anatomy = examine(on_meta(SD15))
    assert list(anatomy.paths) == SD15_PATHS
    assert [len(layer.sites) for layer in anatomy.layers] == [1] * 16
    assert [layer.index for layer in anatomy.layers] == list(range(16))
    assert [layer.place for layer in anatomy.layers] == ["down"] * 6 + ["mid"] + ["up"] * 9
    assert [layer.resolution for layer in anatomy.layers] == [64, 64, 32, 32, 16, 16, 8] + [16] * 3 + [32] * 3 + [
        64
    ] * 3
    channels = [layer.sites[0].channels for layer in anatomy.layers]
    assert channels == [320, 320, 640, 640, 1280, 1280, 1280] + [1280] * 3 + [640] * 3 + [320] * 3
    site = anatomy.layers[0].sites[0]
    assert (site.path, site.heads, site.head_dim, site.text_dim) == (
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2",
        8,
        40,
        768,
    )


def test_sdxl_has_11_layers_of_70_sites():
    anatomy = examine(on_meta(SDXL))
    assert list(anatomy.paths) == [
        "down_blocks.1.attentions.0",
        "down_blocks.1.attentions.1",
        "down_blocks.2.attentions.0",
        "down_blocks.2.attentions.1",
        "mid_block.attentions.0",
        *(f"up_blocks.{block}.attentions.{layer}" for block in range(2) for layer in range(3)),
    ]
    assert [len(layer.sites) for layer in anatomy.layers] == [2, 2, 10, 10, 10, 10, 10, 10, 2, 2, 2]
    assert [layer.resolution for layer in anatomy.layers] == [64, 64, 32, 32, 32, 32, 32, 32, 64, 64, 64]
    assert anatomy.layers[-1].sites[0].heads == 10


def test_layers_come_in_the_order_of_the_forward_pass(tiny_model):
    """The truth: the order in which hooks fire."""
    fired = []
    for layer, sites in tiny_model.anatomy.sites.items():
        module = tiny_model.denoiser.get_submodule(sites[0])
        module.register_forward_hook(lambda module, args, output, layer=layer: fired.append(layer))
    tiny_model.pipe("x", num_inference_steps=1, guidance_scale=1.0, output_type="latent", height=16, width=16)
    assert fired == list(tiny_model.anatomy.paths)


def test_a_denoiser_without_cross_attention_is_named():
    with torch.device("meta"), pytest.raises(AnatomyError, match="UNet2DModel has no cross-attention module"):
        examine(UNet2DModel(sample_size=8, block_out_channels=(32, 32), down_block_types=("DownBlock2D",) * 2,
                            up_block_types=("UpBlock2D",) * 2))  # fmt: skip


def test_sd15_processors_and_tree():
    unet = on_meta(SD15)
    head = inspect.processor_lines(unet)[0]
    assert head == (
        "32 attention processors: 16 self-attention attn1 (down 6, mid 1, up 9), "
        "16 cross-attention attn2 (down 6, mid 1, up 9)"
    )
    lines = inspect.layer_lines(unet)
    assert lines[2].split() == ["down_blocks.0.attentions.0", "down", "64", "320", "8", "40", "768", "1"]
    assert lines[-1].startswith("16 layers, 16 sites")
    tree = list(inspect.tree(unet, 1, "unet"))
    assert tree[0].startswith("unet: UNet2DConditionModel (859.52 M parameters)")
    assert "  conv_in: Conv2d(4, 320, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))" in tree
    assert "  down_blocks: ModuleList of 4" in tree
    assert any(line.startswith("    0: CrossAttnDownBlock2D") for line in inspect.tree(unet, 2))


def test_inspect_prints_a_local_folder(tiny_folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["lesion-inspect", "model=local", f"model.id={tiny_folder}"])
    inspect.main()
    out = capsys.readouterr().out
    assert "up_blocks.1.attentions.1" in out
    assert out.startswith("local: StableDiffusionPipeline with ")
    for component, word in {"text_encoder": "CLIPTextModel", "vae": "AutoencoderKL"}.items():
        lines = inspect.report(["model=local", f"model.id={tiny_folder}", f"component={component}", "depth=3"])
        assert any(word in line for line in lines), component


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model=nonesuch"], "model/nonesuch"),
        (["model=local", "model.id=/nonesuch"], "no folder '/nonesuch'"),
        (["component=hat"], "has no 'hat'; allowed: "),
        (["component=tokenizer"], "is no neural network"),
        (["depth=-1"], "depth: must be a whole number"),
        (["colour=red"], "colour: unknown; allowed: model"),
    ],
)
def test_inspect_refuses_in_one_line(tiny_folder, capsys, monkeypatch, arguments, message):
    if not any(argument.startswith("model=") for argument in arguments):
        arguments = ["model=local", f"model.id={tiny_folder}", *arguments]
    monkeypatch.setattr("sys.argv", ["lesion-inspect", *arguments])
    with pytest.raises(SystemExit) as end:
        inspect.main()
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
