"""Small pipelines to start from."""

from diffusers import DiTPipeline, UNet2DModel
from tiny_dit import plain_dit

from diffusers_dtr import DTRPipeline


def saved(folder, scheduler, vae=None, **options):
    if vae is None:
        unet = UNet2DModel(8, block_out_channels=(4, 4), norm_num_groups=2, down_block_types=("DownBlock2D",) * 2,
                           up_block_types=("UpBlock2D",) * 2)  # fmt: skip
        DTRPipeline(scheduler, unet=unet).save_pretrained(folder, **options)
    else:
        DiTPipeline(plain_dit(), vae, scheduler).save_pretrained(folder, **options)
    return str(folder)
