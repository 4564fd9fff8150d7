"""Write scikit-learn's 1 797 handwritten digits, real 8x8 scans, as an image folder with a train and a test split.

python prepare_digits.py --output_dir digits
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from diffusers_dtr.ranges import Range
from diffusers_dtr.user_errors import run_script


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, help="Folder to write train/<digit>/ and test/<digit>/ into.")
    parser.add_argument("--test_share", type=Range("(0, 1)"), default=0.2, help="Share of held-out images.")
    return parser.parse_args(argv)


def main(args):
    digits = load_digits()
    train, test = train_test_split(
        np.arange(len(digits.images)), test_size=args.test_share, stratify=digits.target, random_state=0
    )
    for split, indices in (("train", train), ("test", test)):
        for index in indices:
            folder = Path(args.output_dir) / split / str(digits.target[index])
            folder.mkdir(parents=True, exist_ok=True)
            # The scans have 17 grey levels, 0 to 16.
            pixels = np.round(digits.images[index] * (255 / 16)).astype(np.uint8)
            Image.fromarray(pixels, mode="L").save(folder / f"{index:04d}.png")
    print(f"{len(train)} training and {len(test)} test images of 10 digits in {args.output_dir}")


if __name__ == "__main__":
    run_script(main, parse_args())
