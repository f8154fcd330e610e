"""Tiny models of the classes that optional metrics load, with random weights, saved as their folders on the hub are."""

from __future__ import annotations

import json
from pathlib import Path

import torch

WORDS = ["yes", "no", "one", "two", "four", "red", "green", "blue", "circle", "square", "does", "this", "figure",
         "show", "please", "answer", "or", "how", "many", "a", "is", "what", "colour"]  # fmt: skip


def louder(model: torch.nn.Module, factor: float = 20) -> None:
    """Make fresh weights so large that images and texts do not look alike."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "position" not in name:
                parameter.mul_(factor)


def write_blip(folder: Path) -> Path:
    """BlipForQuestionAnswering with a BERT tokenizer of a few words."""
    from transformers import (
        BertTokenizer,
        BlipConfig,
        BlipForQuestionAnswering,
        BlipImageProcessorPil,
        BlipProcessor,
    )

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
    vocabulary = [*special, *WORDS, "##s", *"0123456789?\"'.,"]
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = BertTokenizer(str(folder / "vocab.txt"), model_max_length=32)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**size, "vocab_size": len(vocabulary), "encoder_hidden_size": 16, "max_position_embeddings": 32,
            "pad_token_id": 0, "bos_token_id": 5, "eos_token_id": 3, "sep_token_id": 3}  # fmt: skip
    torch.manual_seed(0)
    model = BlipForQuestionAnswering(
        BlipConfig(text_config=text, vision_config={**size, "image_size": 32, "patch_size": 8}, projection_dim=8)
    )
    louder(model, 8)
    model.save_pretrained(folder)
    BlipProcessor(BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder


def write_chat(folder: Path) -> Path:
    """A Qwen2-VL, weights in several files, with a tokenizer of letters and a chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
    )
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
               "<|video_pad|>"]  # fmt: skip
    core.add_special_tokens([AddedToken(one, special=True, normalized=False) for one in special])
    core.add_tokens([AddedToken(word, normalized=False) for word in ("Yes", "yes", "four", "4", "red", "circle")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token=special[0], eos_token=special[2])
    image, vision_start, vision_end = (core.token_to_id(special[number]) for number in (5, 3, 4))
    template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}"
        "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    sizes = {"min_pixels": 28 * 28, "max_pixels": 56 * 56}
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(**sizes), tokenizer, Qwen2VLVideoProcessor(**sizes), chat_template=template
    )
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 2, "vocab_size": len(core.get_vocab()), "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(
            text_config=text,
            vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 1},
            image_token_id=image,
            vision_start_token_id=vision_start,
            vision_end_token_id=vision_end,
            video_token_id=core.token_to_id(special[6]),
        )
    )
    louder(model, 10)
    model.save_pretrained(folder, max_shard_size="20KB")
    processor.save_pretrained(folder)
    return folder


LABELS = {0: "apple", 1: "mouse", 2: "bench"}


def write_yolos(folder: Path) -> Path:
    """YolosForObjectDetection, a detector without masks."""
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessorPil

    torch.manual_seed(0)
    model = YolosForObjectDetection(
        YolosConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=[32, 32],
            patch_size=8,
            num_detection_tokens=8,
            id2label=LABELS,
        )
    )
    louder(model, 30)
    model.save_pretrained(folder)
    YolosImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def write_mask2former(folder: Path) -> Path:
    """Mask2FormerForUniversalSegmentation on a small Swin, as GenEval's detector is."""
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessorPil,
        SwinConfig,
    )

    torch.manual_seed(0)
    swin = SwinConfig(image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4,
                      out_features=["stage1", "stage2", "stage3", "stage4"])  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=6, id2label=LABELS,
    )  # fmt: skip
    model = Mask2FormerForUniversalSegmentation(config)
    louder(model, 5)
    model.save_pretrained(folder)
    Mask2FormerImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def small_tower(patch_size: int = 32, depth: int = 2):
    """DreamSim's own vision transformer, small: stands for its `vit_base`."""
    from dreamsim.feature_extraction.vision_transformer import VisionTransformer

    return VisionTransformer(patch_size=patch_size, embed_dim=16, depth=depth, num_heads=2, qkv_bias=True)


def write_dreamsim(folder: Path) -> Path:
    """The folder of kind open_clip_vitb32 as the package makes it: a tower, and an adapter of its attention."""
    torch.manual_seed(0)
    tower = small_tower()
    tower.pos_drop = torch.nn.LayerNorm(16)
    louder(tower, 10)
    folder.mkdir(parents=True)
    state = {**tower.state_dict(), "proj": torch.randn(16, 12)}
    torch.save({"state_dict": state}, folder / "open_clip_vitb32_pretrain.pth.tar")
    _write_adapter(folder / "open_clip_vitb32_single_lora", blocks=2)
    return folder


HUB = """
import torch
from judges import small_tower

def dinov2_vitb14():
    tower = small_tower(patch_size=14, depth=12)
    weights = f"{torch.hub.get_dir()}/checkpoints/dinov2_vitb14_pretrain.pth"
    tower.load_state_dict(torch.load(weights, weights_only=True))
    return tower
"""


def write_dreamsim_of_dinov2(folder: Path) -> Path:
    """The folder of kind dinov2_vitb14: the tower's code and weights lie as torch hub keeps them."""
    torch.manual_seed(0)
    tower = small_tower(patch_size=14, depth=12)
    louder(tower, 3)  # through twelve blocks a larger factor blows up what floats round off
    for name in ("checkpoints", "facebookresearch_dinov2_main"):
        (folder / name).mkdir(parents=True)
    torch.save(tower.state_dict(), folder / "checkpoints" / "dinov2_vitb14_pretrain.pth")
    (folder / "facebookresearch_dinov2_main" / "hubconf.py").write_text(HUB)
    (folder / "dinov2_vitb14_pretrain.pth").touch()  # the package asks for it, and reads nothing of it
    _write_adapter(folder / "dinov2_vitb14_single_lora", blocks=12)
    return folder


def _write_adapter(folder: Path, blocks: int) -> None:
    from safetensors.torch import save_file

    folder.mkdir()
    config = {"r": 2, "lora_alpha": 1, "lora_dropout": 0.0, "bias": "none", "target_modules": ["qkv"],
              "peft_type": "LORA", "base_model_name_or_path": "", "inference_mode": True}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    weights = {}
    for block in range(blocks):
        name = f"base_model.model.extractor_list.0.model.blocks.{block}.attn.qkv"
        weights[f"{name}.lora_A.weight"] = torch.randn(2, 16)
        weights[f"{name}.lora_B.weight"] = torch.randn(48, 2)
    save_file(weights, folder / "adapter_model.safetensors")
