"""Images, videos and captions: found, decoded, cached and put into batches."""

from .captions import CaptionedDataset
from .classes import match_classes, match_pretrained_classes
from .loading import TrainingData, build_loader, held_out_samples, load_data, load_images
from .precompute import precompute_latents, precompute_text_embeddings


__all__ = [
    "CaptionedDataset",
    "TrainingData",
    "build_loader",
    "held_out_samples",
    "load_data",
    "load_images",
    "match_classes",
    "match_pretrained_classes",
    "precompute_latents",
    "precompute_text_embeddings",
]
