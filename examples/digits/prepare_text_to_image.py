"""Write captioned digits, and a tiny text-to-image pipeline to train on them: real components, no download.

python prepare_digits.py --output_dir digits
python prepare_text_to_image.py --digits_dir digits --family sd --output_dir digits-sd

The folder gets train/ and test/, images with captions such as "a handwritten seven", and pipeline/: tokenizers made
for the captions, text encoders of two layers with random weights, an autoencoder trained on the digits, and a
denoiser that has learned nothing yet.
"""

import argparse
import json
import math
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from diffusers_dtr.ranges import COUNT
from diffusers_dtr.user_errors import run_script


NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS = ("a handwritten {}", "the digit {}", "{}")

RESOLUTION = 16  # the scans are 8x8: twice as large, so that latents are 8x8
LATENT_SIZE = 8
LATENT_CHANNELS = 1
TEXT_WIDTH = 32
MAX_TOKENS = 16

SCHEDULE = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "timestep_spacing": "trailing"}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits_dir", required=True, help="Folder that prepare_digits.py wrote.")
    parser.add_argument("--family", required=True, choices=PIPELINES, help="Which pipeline to write.")
    parser.add_argument("--output_dir", required=True, help="Folder to write train/, test/ and pipeline/ into.")
    parser.add_argument("--vae_steps", type=COUNT, default=200, help="Steps that the autoencoder is trained for.")
    return parser.parse_args(argv)


def captions_of(label):
    return [caption.format(NAMES[label]) for caption in CAPTIONS]


def write_captioned_images(digits_dir, output_dir):
    for split in ("train", "test"):
        folder = output_dir / split
        folder.mkdir(parents=True)
        lines = []
        for path in sorted((digits_dir / split).glob("*/*.png")):
            shutil.copy(path, folder)
            lines.append(json.dumps({"file_name": path.name, "text": captions_of(int(path.parent.name))}))
        (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
        print(f"{len(lines)} captioned images in {folder}")


def train_vae(images_dir, steps):
    """An autoencoder from 16x16 grey images to 8x8 latents of unit variance."""
    images = [
        Image.open(path).resize((RESOLUTION,) * 2, Image.Resampling.BILINEAR) for path in images_dir.glob("*.png")
    ]
    pixels = torch.from_numpy(np.stack(images)).float()[:, None] / 127.5 - 1
    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        latent_channels=LATENT_CHANNELS,
        sample_size=RESOLUTION,
        mid_block_add_attention=False,
        shift_factor=0.0,  # StableDiffusion3Pipeline adds it as it is
    )
    optimizer = torch.optim.Adam(vae.parameters(), lr=2e-3)
    for step in range(steps):
        batch = pixels[torch.randint(len(pixels), (64,))]
        posterior = vae.encode(batch).latent_dist
        error = (vae.decode(posterior.sample()).sample - batch).square().mean()
        (error + 1e-3 * posterior.kl().mean() / posterior.mean[0].numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.sample()
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    print(f"Autoencoder: mean squared error {error.item():.4f} of pixels in [-1, 1]")
    return vae.eval()


def clip_tokenizer():
    letters = sorted({letter for label in range(10) for caption in captions_of(label) for letter in caption} - {" "})
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    spelling = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=MAX_TOKENS)
    # Of which 256 are bytes.
    return spelling.train_new_from_iterator(map(captions_of, range(10)), vocab_size=512)


def t5_tokenizer():
    """Its pieces are the words of the captions, as often as they occur."""
    words = Counter(word for label in range(10) for caption in captions_of(label) for word in caption.split())
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces = [(f"▁{word}", math.log(count / words.total())) for word, count in words.items()]
    return T5Tokenizer(vocab=[*special, ("▁", -10.0), *pieces], extra_ids=0, model_max_length=MAX_TOKENS)


def clip_text_encoder(model_class, tokenizer, width):
    config = CLIPTextConfig(
        hidden_size=width,
        projection_dim=width,
        intermediate_size=2 * width,
        num_attention_heads=2,
        num_hidden_layers=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        # Random weights stay as they are: large enough for different words to make a difference.
        initializer_factor=10.0,
    )
    return model_class(config)


def t5_text_encoder(tokenizer):
    size = {"d_model": TEXT_WIDTH, "d_kv": 16, "d_ff": 64, "num_heads": 2, "num_layers": 2}
    return T5EncoderModel(T5Config(**size, vocab_size=len(tokenizer), dropout_rate=0.0))


def stable_diffusion(vae):
    tokenizer = clip_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=8,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=clip_text_encoder(CLIPTextModel, tokenizer, TEXT_WIDTH),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(**SCHEDULE, clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def pixart(vae):
    tokenizer = t5_tokenizer()
    transformer = PixArtTransformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        num_layers=6,
        num_attention_heads=4,
        attention_head_dim=24,
        cross_attention_dim=96,
        caption_channels=TEXT_WIDTH,
        out_channels=LATENT_CHANNELS,
    )
    scheduler = DPMSolverMultistepScheduler(**SCHEDULE)
    return PixArtAlphaPipeline(tokenizer, t5_text_encoder(tokenizer), vae, transformer, scheduler)


def stable_diffusion_3(vae):
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=6,
        num_attention_heads=4,
        attention_head_dim=24,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=96,
        pooled_projection_dim=TEXT_WIDTH,
        pos_embed_max_size=LATENT_SIZE,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        # Side by side, these two are as wide as the third.
        text_encoder=clip_text_encoder(CLIPTextModelWithProjection, clip, TEXT_WIDTH // 2),
        tokenizer=clip,
        text_encoder_2=clip_text_encoder(CLIPTextModelWithProjection, clip, TEXT_WIDTH // 2),
        tokenizer_2=clip,
        text_encoder_3=t5_text_encoder(t5),
        tokenizer_3=t5,
    )


PIPELINES = {"sd": stable_diffusion, "pixart": pixart, "sd3": stable_diffusion_3}


def main(args):
    output_dir = Path(args.output_dir)
    write_captioned_images(Path(args.digits_dir), output_dir)
    torch.manual_seed(0)
    pipeline = PIPELINES[args.family](train_vae(output_dir / "train", args.vae_steps))
    pipeline.save_pretrained(output_dir / "pipeline")
    print(f"{type(pipeline).__name__} in {output_dir / 'pipeline'}")


if __name__ == "__main__":
    run_script(main, parse_args())
