"""Layer lists of the published architectures, built on the meta device, and of `lesion-inspect`."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from lesion.cli import structure as inspect
from lesion.surgery.anatomy import AnatomyError, attentions_of, examine, kinds_of, text_sites
from shipped import assert_shipped

LEAVES = ("cross_attention", "self_attention", "feed_forward")  # kinds that are modules of a block

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
    name = "sdxl" if config is SDXL else "sd15"
    if name not in BUILT:
        with torch.device("meta"):
            BUILT[name] = UNet2DConditionModel.from_config(config)
    return BUILT[name]


BUILT: dict[str, UNet2DConditionModel] = {}


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
    assert lines[-2].startswith("16 layers, 16 sites")
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
        (["model=nonesuch"], "model: there is no choice 'nonesuch'"),
        (["model=local", "model.id=/nonesuch"], "no folder '/nonesuch'"),
        (["component=hat"], "has no 'hat'; allowed: "),
        (["component=tokenizer"], "is no neural network"),
        (["depth=-1"], "depth: must be a whole number"),
        (["by=colour"], "by: got 'colour'; allowed: attention, "),
        (["kind=joint_attention"], "has no joint-attention module; allowed: cross_attention, "),
        (["by=head", "kind=block"], "block has no attention heads"),
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


@pytest.mark.parametrize(
    ("by", "paths", "sites"),
    [
        ("attention", SD15_PATHS, [1] * 16),
        ("transformer_block", [f"{path}.transformer_blocks.0" for path in SD15_PATHS], [1] * 16),
        (
            "block",
            [*(f"down_blocks.{i}" for i in range(3)), "mid_block", *(f"up_blocks.{i}" for i in range(1, 4))],
            [2, 2, 2, 1, 3, 3, 3],
        ),
        ("stage", ["down_blocks", "mid_block", "up_blocks"], [6, 1, 9]),
    ],
)
@pytest.mark.parametrize("kind", LEAVES)
def test_granularities_and_kinds_of_sd15(by, paths, sites, kind):
    unet = on_meta(SD15)
    anatomy = examine(unet, by, kind)
    assert list(anatomy.paths) == paths
    assert [len(layer.sites) for layer in anatomy.layers] == sites
    assert [layer.place for layer in anatomy.layers] == [path.split("_")[0] for path in paths]
    found = [site.path for layer in anatomy.layers for site in layer.sites]
    leaf = {"cross_attention": "attn2", "self_attention": "attn1", "feed_forward": "ff"}[kind]
    assert found == [f"{path}.transformer_blocks.0.{leaf}" for path in SD15_PATHS]  # in forward order, each once
    assert all(unet.get_submodule(path) is not None for path in paths)  # layers are module paths
    first = anatomy.layers[0].sites[0]
    text_dim = {"cross_attention": 768, "self_attention": 0, "feed_forward": 0}[kind]
    assert (first.channels, first.text_dim) == (320, text_dim)


def test_sdxl_by_transformer_block():
    anatomy = examine(on_meta(SDXL), "transformer_block")
    assert len(anatomy.paths) == 70
    assert anatomy.paths[4] == "down_blocks.2.attentions.0.transformer_blocks.0"
    assert anatomy.paths[-1] == "up_blocks.1.attentions.2.transformer_blocks.1"
    assert [len(layer.sites) for layer in examine(on_meta(SDXL), "stage").layers] == [24, 10, 36]


PIXART = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "cross_attention_dim": 1152,
    "sample_size": 128,
    "caption_channels": 4096,
    "norm_type": "ada_norm_single",
}


@pytest.mark.parametrize(
    ("name", "config", "prefix", "number", "text_dim"),
    [
        ("PixArtTransformer2DModel", PIXART, "transformer_blocks", 28, 1152),
        ("SanaTransformer2DModel", {}, "transformer_blocks", 20, 2240),
        (
            "HunyuanDiT2DModel",
            {"num_layers": 40, "hidden_size": 1408, "sample_size": 128, "in_channels": 4, "patch_size": 2},
            "blocks",
            40,
            1024,
        ),
    ],
)
def test_transformers_with_cross_attention(name, config, prefix, number, text_dim):
    import diffusers

    with torch.device("meta"):
        denoiser = getattr(diffusers, name).from_config(config)
    for by in ("attention", "transformer_block"):
        for kind in LEAVES:
            anatomy = examine(denoiser, by, kind)
            assert list(anatomy.paths) == [f"{prefix}.{i}" for i in range(number)]
            assert [len(layer.sites) for layer in anatomy.layers] == [1] * number
    assert examine(denoiser).layers[0].sites[0].text_dim == text_dim
    assert [layer.index for layer in examine(denoiser).layers] == list(range(number))
    with pytest.raises(AnatomyError, match="no UNet blocks"):
        examine(denoiser, "stage")
    assert_shipped(denoiser, config)


def test_kinds_and_text_sites():
    unet = on_meta(SD15)
    assert kinds_of(unet) == ("cross_attention", "self_attention", "feed_forward", "block")
    assert set(text_sites(unet)) == set(examine(unet).by_path)
    assert list(attentions_of(unet).values()).count("self_attention") == 16
    assert kinds_of(torch.nn.Linear(1, 1)) == ()
    with pytest.raises(AnatomyError, match="Linear has no cross-attention module, nor others of the form") as end:
        examine(torch.nn.Linear(1, 1))
    assert end.value.key == "model.id"


def test_a_class_that_nobody_listed():
    """Blocks of another name that hold diffusers' attentions are found, in forward order."""
    from diffusers.models.attention_processor import Attention

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attn1 = Attention(8, heads=2, dim_head=4)
            self.attn2 = Attention(8, cross_attention_dim=6, heads=2, dim_head=4)
            self.ff = torch.nn.Linear(8, 8)

    class Novel(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.refining_layers = torch.nn.ModuleList([Block() for _ in range(11)])
            self.attn2 = Attention(8, heads=2, dim_head=4)  # in no block

    novel = Novel()
    assert kinds_of(novel) == ("cross_attention", "self_attention", "feed_forward", "block")
    for kind in kinds_of(novel):
        assert list(examine(novel, kind=kind).paths) == [f"refining_layers.{i}" for i in range(11)]
    assert examine(novel).layers[10].sites[0].text_dim == 6


def test_inspect_lists_joint_attention():
    from test_joint import FLUX, SD3
    from test_joint import on_meta as build

    flux = build("FluxTransformer2DModel", FLUX)
    lines = inspect.layer_lines(flux)
    assert lines[-2].startswith("57 layers, 57 sites")
    counts = "joint_attention 57, text_to_image 57, feed_forward 57, block 57, text_stream 57; 1368 heads"
    assert lines[-1] == f"sites by kind: {counts}"
    assert inspect.processor_lines(flux)[0] == "57 attention processors: 57 joint attention attn"
    sd3 = build("SD3Transformer2DModel", SD3)
    assert inspect.layer_lines(sd3, "head", "joint_attention")[-2].startswith("576 layers, 576 sites")
    assert inspect.processor_lines(sd3)[0] == "24 attention processors: 24 joint attention attn"
    assert inspect.layer_lines(sd3, kind="feed_forward")[-2].startswith("24 layers, 24 sites")
