"""Tiny pipelines of the real diffusers classes, saved to a folder: real components, random weights, byte tokenizers.

Each builder writes a folder that `DiffusionPipeline.from_pretrained` reads. Nothing is downloaded. SIDE gives for each
class an image side that its latents divide.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import tokenizers.models
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, decoders, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

WIDTH = 16  # of CLIP; of T5 it is twice this, since SD3 puts two CLIPs side by side and pads them to T5's width


def byte_tokenizer(length: int = 77) -> CLIPTokenizer:
    """A CLIP tokenizer without merges: every text is spelled in bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({token: i for i, token in enumerate(tokens)}, [], model_max_length=length)


def text_encoder(tokenizer: CLIPTokenizer, width: int = 16) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config).eval()


def small_unet() -> UNet2DConditionModel:
    """SD 1.5's layout with two levels: 2 + 1 + 3 cross-attention layers."""
    return UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=8,
    ).eval()


def small_pipeline(unet: UNet2DConditionModel | None = None) -> StableDiffusionPipeline:
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=16,
    ).eval()
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=unet or small_unet(),
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def letters() -> list[str]:
    return sorted({*pre_tokenizers.ByteLevel.alphabet(), *map(chr, range(33, 127))})


def t5_tokenizer() -> T5Tokenizer:
    """Unigram over letters: every word is spelled."""
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0), *((letter, -3.0) for letter in letters())]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=512)


def t5_encoder(tokenizer: T5Tokenizer, width: int = 2 * WIDTH) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=2,
        relative_attention_num_buckets=8, is_encoder_decoder=False,
    )  # fmt: skip
    return T5EncoderModel(config).eval()


def gemma_tokenizer() -> GemmaTokenizer:
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *letters()]
    return GemmaTokenizer(vocab={token: i for i, token in enumerate(dict.fromkeys(tokens))})


def bert_tokenizer(folder: Path) -> BertTokenizer:
    pieces = [*letters(), *("##" + letter for letter in letters())]
    path = folder.with_name(f"{folder.name}-vocab.txt")
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces]) + "\n")
    return BertTokenizer(str(path), model_max_length=77)


def clip_with_projection(tokenizer: Any) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(text_encoder(tokenizer, WIDTH).config).eval()


def autoencoder(levels: int = 2, latents: int = 4, **more: Any) -> AutoencoderKL:
    """Shrinks an image's side by 2 ** (levels - 1)."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8,) * levels, layers_per_block=1, norm_num_groups=4, latent_channels=latents,
        sample_size=16, **more,
    ).eval()  # fmt: skip


def _pixart(name: str, folder: Path) -> None:
    tokenizer = t5_tokenizer()
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8, num_layers=3, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
        out_channels=8, caption_channels=2 * WIDTH, cross_attention_dim=16, use_additional_conditions=False,
    )  # fmt: skip
    getattr(diffusers, name)(
        tokenizer=tokenizer,
        text_encoder=t5_encoder(tokenizer),
        vae=autoencoder(),
        transformer=transformer.eval(),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    ).save_pretrained(folder)


def pixart_alpha(folder: Path) -> None:
    _pixart("PixArtAlphaPipeline", folder)


def pixart_sigma(folder: Path) -> None:
    _pixart("PixArtSigmaPipeline", folder)


def sana(folder: Path) -> None:
    tokenizer = gemma_tokenizer()
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=2048, attn_implementation="eager",
    )  # fmt: skip
    transformer = diffusers.SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=3, num_attention_heads=2, attention_head_dim=8,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16,
        sample_size=32,
    )  # fmt: skip
    vae = AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"), decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)), encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        downsample_block_type="conv", upsample_block_type="interpolate", decoder_norm_types="rms_norm",
        decoder_act_fns="silu", scaling_factor=0.41407,
    )  # fmt: skip
    diffusers.SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=Gemma2Model(config).eval(),
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder)


def hunyuan_dit(folder: Path) -> None:
    bert, t5 = bert_tokenizer(folder), t5_tokenizer()
    config = BertConfig(
        vocab_size=len(bert), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=77,
    )  # fmt: skip
    transformer = diffusers.HunyuanDiT2DModel(
        sample_size=8, num_layers=4, patch_size=2, attention_head_dim=8, num_attention_heads=3, in_channels=4,
        cross_attention_dim=32, cross_attention_dim_t5=32, pooled_projection_dim=16, hidden_size=24,
        activation_fn="gelu-approximate",
    )  # fmt: skip
    diffusers.HunyuanDiTPipeline(
        vae=autoencoder(levels=4),  # the pipeline counts on a side of 8 pixels a latent
        text_encoder=BertModel(config).eval(),
        tokenizer=bert,
        text_encoder_2=t5_encoder(t5),
        tokenizer_2=t5,
        transformer=transformer.eval(),
        scheduler=diffusers.DDPMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def stable_diffusion_3(folder: Path, **more: Any) -> None:
    clip, t5 = byte_tokenizer(), t5_tokenizer()
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=2 * WIDTH, pos_embed_max_size=16, **more,
    )  # fmt: skip
    diffusers.StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609, scaling_factor=1.5305),
        text_encoder=clip_with_projection(clip),
        tokenizer=clip,
        text_encoder_2=clip_with_projection(clip),
        tokenizer_2=clip,
        text_encoder_3=t5_encoder(t5),
        tokenizer_3=t5,
    ).save_pretrained(folder)


def stable_diffusion_35(folder: Path) -> None:
    """As SD 3.5 medium: normed queries and keys, and a second attention in some blocks."""
    stable_diffusion_3(folder, qk_norm="rms_norm", dual_attention_layers=(0, 1))


def flux(folder: Path, guidance: bool = True) -> None:
    """FLUX.1-dev: guidance is an input. guidance=False: FLUX.1-schnell."""
    clip, t5 = byte_tokenizer(), t5_tokenizer()
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=2 * WIDTH, pooled_projection_dim=WIDTH, guidance_embeds=guidance, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    diffusers.FluxPipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=guidance, shift=3.0 if guidance else 1.0),
        vae=autoencoder(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1159, scaling_factor=0.3611),
        text_encoder=text_encoder(clip, WIDTH),
        tokenizer=clip,
        text_encoder_2=t5_encoder(t5),
        tokenizer_2=t5,
    ).save_pretrained(folder)


def flux_schnell(folder: Path) -> None:
    flux(folder, guidance=False)


def stable_diffusion_2(folder: Path) -> None:
    """SD 2.x: v-prediction, linear projections, heads of one width."""
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16, attention_head_dim=(2, 4), use_linear_projection=True, norm_num_groups=8,
    )  # fmt: skip
    pipe = small_pipeline(unet.eval())
    pipe.scheduler = diffusers.DDIMScheduler(
        prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1,
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
    )  # fmt: skip
    pipe.save_pretrained(folder)


def lcm(folder: Path) -> None:
    """A latent consistency model: guidance is an input of its UNet."""
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=16, attention_head_dim=2, norm_num_groups=8, time_cond_proj_dim=16,
    )  # fmt: skip
    base = small_pipeline(unet.eval())
    parts = {name: part for name, part in base.components.items() if name != "image_encoder"}
    parts["scheduler"] = diffusers.LCMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    diffusers.LatentConsistencyModelPipeline(**parts, requires_safety_checker=False).save_pretrained(folder)


CHAT = "{% for one in messages if one.role == 'user' %}<|im_start|>user {{ one.content }}<|im_end|>{% endfor %}"


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Bytes, with the special tokens of Qwen's templates."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: i for i, token in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), *special])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], model_max_length=512, additional_special_tokens=special[1:])
    tokenizer.chat_template = CHAT
    return tokenizer


def language(tokenizer: Any, layers: int = 2) -> dict[str, Any]:
    """Config values of a tiny language model."""
    return {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": layers,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 1024,
        "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip


def qwen_image(folder: Path) -> None:
    tokenizer = qwen_tokenizer()
    text = language(tokenizer) | {"rope_scaling": {"type": "default", "mrope_section": [1, 1, 2]}}
    sight = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=sight)
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    diffusers.QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae.eval(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(config).eval(),
        tokenizer=tokenizer,
        transformer=transformer.eval(),
    ).save_pretrained(folder)


def _flux2(width: int, guidance: bool) -> dict[str, Any]:
    vae = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=16,
    )  # fmt: skip
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=width, timestep_guidance_channels=16, axes_dims_rope=(2, 2, 2, 2), guidance_embeds=guidance,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return {"vae": vae.eval(), "transformer": transformer.eval(), "scheduler": scheduler}


def flux2(folder: Path) -> None:
    """FLUX.2-dev: guidance is an input; the text features are three layers of a language model that also sees."""
    special = ["<s>", "</s>", "<pad>", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    letters_of_bytes = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*special, *letters_of_bytes])}
    bare = Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    bare.pre_tokenizer, bare.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bare.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bare, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=512
    )
    chat = "{% for one in messages if one.role == 'user' %}<s>{{ one.content[0].text }}</s>{% endfor %}"
    processor = PixtralProcessor(PixtralImageProcessorPil(), tokenizer, chat_template=chat)
    sight = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8,
        "image_size": 32, "patch_size": 16,
    }  # fmt: skip
    config = Mistral3Config(
        text_config={"model_type": "mistral", **language(tokenizer, 31)},
        vision_config={"model_type": "pixtral", **sight},
    )
    encoder = Mistral3ForConditionalGeneration(config).eval()
    diffusers.Flux2Pipeline(text_encoder=encoder, tokenizer=processor, **_flux2(48, True)).save_pretrained(folder)


def flux2_klein(folder: Path) -> None:
    tokenizer = qwen_tokenizer()
    encoder = Qwen3ForCausalLM(Qwen3Config(**language(tokenizer, 28))).eval()
    diffusers.Flux2KleinPipeline(text_encoder=encoder, tokenizer=tokenizer, **_flux2(48, False)).save_pretrained(folder)


def z_image(folder: Path) -> None:
    tokenizer = qwen_tokenizer()
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=16, n_layers=3, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[2, 2, 4], axes_lens=[1024, 64, 64],
    )  # fmt: skip
    diffusers.ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1159, scaling_factor=0.3611),
        text_encoder=Qwen3Model(Qwen3Config(**language(tokenizer))).eval(),
        tokenizer=tokenizer,
        transformer=transformer.eval(),
    ).save_pretrained(folder)


def stable_diffusion(folder: Path) -> None:
    """6 cross-attention layers, which are made loud."""
    pipe = small_pipeline()
    with torch.no_grad():
        for path, module in pipe.unet.named_modules():
            if path.endswith("attn2"):
                module.to_out[0].weight.mul_(8)
    pipe.save_pretrained(folder)


def stable_diffusion_xl(folder: Path) -> None:
    """Two text encoders, added conditions; 4 cross-attention layers."""
    torch.manual_seed(1)
    base = small_pipeline()
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
        norm_num_groups=8,
    ).eval()
    second = CLIPTextModelWithProjection(base.text_encoder.config).eval()
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=base.vae,
        text_encoder=base.text_encoder,
        text_encoder_2=second,
        tokenizer=base.tokenizer,
        tokenizer_2=base.tokenizer,
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(),
        add_watermarker=False,
    )
    pipe.save_pretrained(folder)


BUILDERS: dict[str, Callable[[Path], None]] = {
    "sd": stable_diffusion,
    "sdxl": stable_diffusion_xl,
    "pixart_alpha": pixart_alpha,
    "pixart_sigma": pixart_sigma,
    "sana": sana,
    "hunyuan_dit": hunyuan_dit,
    "sd3": stable_diffusion_3,
    "sd35": stable_diffusion_35,
    "flux": flux,
    "flux_schnell": flux_schnell,
    "sd2": stable_diffusion_2,
    "lcm": lcm,
    "qwen_image": qwen_image,
    "flux2": flux2,
    "flux2_klein": flux2_klein,
    "z_image": z_image,
}
SIDE = {"hunyuan_dit": 32, "sana": 32}  # pixels; of the others 16


def side(name: str) -> int:
    return SIDE.get(name, 16)


def build(name: str, folder: Path) -> Path:
    """Write the pipeline of this name to a folder that is not there yet."""
    torch.manual_seed(0)
    BUILDERS[name](folder)
    return folder


__all__ = ["BUILDERS", "build", "side"]
