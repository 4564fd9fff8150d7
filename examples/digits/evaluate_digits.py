"""Sample every digit from a trained pipeline, draw them as a labelled grid, and say how good they are.

Prints, as JSON, the held-out denoising loss and the share of samples that a classifier reads as the digit that was
asked for. The classifier has only ever seen real digits; its own accuracy on held-out ones is printed beside. A
pipeline in a folder gets the figures in its `metrics.json`, where `diffusers-dtr card` finds them.

    python evaluate_digits.py --pipeline pipeline --digits_dir digits --samples samples.png
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image, ImageDraw, ImageFont
from sklearn.svm import SVC

from diffusers_dtr import DTRPipeline, NoiseLevels, cluster_timesteps
from diffusers_dtr.model_card import save_metrics
from diffusers_dtr.ranges import COUNT, NON_NEGATIVE, SEED
from diffusers_dtr.training import HeldOutLoss
from diffusers_dtr.user_errors import run_script


EVALUATIONS_PER_IMAGE = 4


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", required=True, help="Folder or Hub repository of the pipeline.")
    parser.add_argument("--digits_dir", required=True, help="What prepare_digits.py wrote.")
    parser.add_argument("--samples", default="samples.png", help="Picture to write.")
    parser.add_argument("--num_per_digit", type=COUNT, default=10)
    parser.add_argument("--guidance_scale", type=NON_NEGATIVE, default=1.5)
    parser.add_argument("--num_inference_steps", type=COUNT, default=50)
    parser.add_argument("--seed", type=SEED, default=0)
    return parser.parse_args(argv)


def read_split(digits_dir, split):
    paths = sorted(Path(digits_dir, split).glob("*/*.png"))
    images = np.stack([np.asarray(Image.open(path), dtype=np.float32) for path in paths]) / 255
    return images, np.array([int(path.parent.name) for path in paths])


def draw_grid(images, labels, num_per_digit, scale=6, margin=28, gap=6):
    side = images.shape[1] * scale + gap
    rows = len(labels) // num_per_digit
    grid = Image.new("L", (margin + num_per_digit * side, rows * side), 255)
    draw = ImageDraw.Draw(grid)
    font = ImageFont.load_default(size=side // 2)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        row, column = divmod(number, num_per_digit)
        tile = Image.fromarray((image * 255).round().astype(np.uint8)).resize(
            (side - gap, side - gap), Image.Resampling.NEAREST
        )
        grid.paste(tile, (margin + column * side, row * side))
        if column == 0:
            draw.text((margin // 2, (row + 0.5) * side), str(label), fill=0, anchor="mm", font=font)
    return grid


def held_out_loss(pipeline, images, labels):
    levels = NoiseLevels(pipeline.scheduler)
    clean = torch.from_numpy(images)[:, None] * 2 - 1
    clusters = cluster_timesteps(levels.num_train_timesteps, num_clusters=8, cost="uniform")
    batch = {"class_labels": torch.from_numpy(labels)}
    measure = HeldOutLoss(levels, clusters, clean, batch, evaluations_per_image=EVALUATIONS_PER_IMAGE)
    denoiser = pipeline.denoiser
    return measure(
        lambda noisy, timesteps, batch: denoiser(noisy, timesteps, **batch, return_dict=False)[0], Accelerator()
    )


def card_metrics(args, report, num_held_out):
    sampling = {
        "samples": 10 * args.num_per_digit,
        "guidance_scale": args.guidance_scale,
        "num_inference_steps": args.num_inference_steps,
        "seed": args.seed,
        "classifier": "SVM (RBF kernel) fitted to the real training digits",
        "classifier_accuracy_on_held_out_digits": report["classifier_accuracy_on_held_out_digits"],
    }
    evaluation = {"images": num_held_out, "noised_samples": num_held_out * EVALUATIONS_PER_IMAGE}
    shared = {"dataset": "scikit-learn digits"}
    return [
        {
            "name": "Samples that a classifier reads as the digit asked for",
            "type": "accuracy",
            "value": report["share_of_samples_read_as_asked"],
            "settings": sampling,
            **shared,
        },
        {
            "name": "Denoising loss on the held-out digits",
            "type": "mse",
            "value": report["held_out_denoising_loss"],
            "settings": evaluation,
            **shared,
        },
    ]


def main(args):
    pipeline = DTRPipeline.from_pretrained(args.pipeline)
    pipeline.set_progress_bar_config(desc="Sampling")
    labels = np.repeat(np.arange(10), args.num_per_digit)
    samples = pipeline(
        class_labels=torch.from_numpy(labels),
        guidance_scale=args.guidance_scale,
        num_inference_steps=args.num_inference_steps,
        generator=torch.Generator().manual_seed(args.seed),
        output_type="np",
    ).images[..., 0]
    draw_grid(samples, labels, args.num_per_digit).save(args.samples)

    train_images, train_labels = read_split(args.digits_dir, "train")
    test_images, test_labels = read_split(args.digits_dir, "test")
    # In units of the scans' 16 grey levels, for which scikit-learn's digits example found this gamma.
    classifier = SVC(gamma=0.001, C=10).fit(train_images.reshape(-1, 64) * 16, train_labels)
    losses = held_out_loss(pipeline, test_images, test_labels)
    report = {
        "held_out_denoising_loss": round(losses.mean, 5),
        "held_out_denoising_loss_per_eighth_of_timesteps": [round(loss, 5) for loss in losses.per_cluster],
        "share_of_samples_read_as_asked": float((classifier.predict(samples.reshape(-1, 64) * 16) == labels).mean()),
        "classifier_accuracy_on_held_out_digits": round(
            classifier.score(test_images.reshape(-1, 64) * 16, test_labels), 4
        ),
        "samples": args.samples,
    }
    if Path(args.pipeline).is_dir():
        save_metrics(args.pipeline, card_metrics(args, report, len(test_images)), sys.argv)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    run_script(main, parse_args())
