"""Networks whose features sets of images are compared by, each known by its name and the hash of its weights."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from evaluation_samples import fill_shards, open_npz, read_shard, tensors_hash, write_npz
from torch import Tensor


INCEPTION = "inception"


@dataclass(frozen=True)
class FeatureNetwork:
    """A network on a device.

    Args:
        name: What it is called in results.
        sha256: Of its weights, or of its file.
        run: From uint8 images `(n, 3, height, width)` to features `(n, d)` and logits `(n, classes)` or None.
        notes: What else is known of it, such as its accuracy.
    """

    name: str
    sha256: str
    run: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    notes: dict = field(default_factory=dict)

    @property
    def identity(self):
        """What tells it from other networks."""
        return {"name": self.name, "sha256": self.sha256}

    @torch.no_grad()
    def __call__(self, images, batch_size=64):
        """Features and logits of images of any number, as float32 arrays; without logits an empty array."""
        outputs = [self.run(part.contiguous()) for part in images.split(batch_size)]
        features = torch.cat([part.float().cpu() for part, _ in outputs])
        if features.ndim != 2 or not features.isfinite().all():
            raise ValueError(
                f"The network {self.name} must give finite features (n, d), got {tuple(features.shape)}, of which "
                f"{features.isfinite().logical_not().sum()} are not finite."
            )
        logits = [part.float().cpu() for _, part in outputs if part is not None]
        return {"features": features.numpy(), "logits": torch.cat(logits).numpy() if logits else np.zeros((0, 0))}


def load_network(source, weights, device):
    """The network that `--feature_extractor` names.

    Args:
        source: "inception", a TorchScript file, or a model of transformers, by id or path.
        weights: File of Inception's weights, or None to download them.
        device: Where it computes.

    Raises:
        ValueError: If it is none of these.
        ImportError: Without torch-fidelity, for Inception.
    """
    if source == INCEPTION:
        return _inception(weights, device)
    if weights is not None:
        raise ValueError(f"`--feature_weights` are those of `--feature_extractor {INCEPTION}`, got {source!r}.")
    return _torchscript(source, device) if os.path.isfile(source) else _transformers(source, device)


def _inception(weights, device):
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:  # torchvision of another build of torch
        raise ImportError(
            f"`--feature_extractor {INCEPTION}` needs torch-fidelity and a torchvision of this build of torch: "
            f'pip install "diffusers-dtr[inception]". ({error})'
        ) from error
    if weights is not None:
        torch.load(weights, weights_only=True)  # refuses what is more than weights, which the class would run
    model = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=weights, verbose=False
    )
    model = model.to(device)
    return FeatureNetwork(INCEPTION, tensors_hash(model.state_dict()), lambda images: model(images.to(device)))


def _torchscript(path, device):
    extra = {"metadata.json": ""}
    try:
        model = torch.jit.load(path, map_location=device, _extra_files=extra).eval()
    except RuntimeError as error:
        raise ValueError(f"`--feature_extractor` {path!r} is a file, but no TorchScript: {error}") from error
    arguments = {argument.name for argument in model.forward.schema.arguments}

    def run(images):
        images = images.to(device)
        if "return_features" in arguments:  # NVIDIA's file of Inception, whose output is probabilities otherwise
            return model(images, return_features=True), model(images, no_output_bias=True).log()
        output = model(images)
        return output if isinstance(output, tuple) else (output, None)

    notes = json.loads(extra["metadata.json"] or "{}")
    return FeatureNetwork(Path(path).name, hashlib.sha256(Path(path).read_bytes()).hexdigest(), run, notes)


def _transformers(source, device):
    from transformers import AutoImageProcessor, AutoModel

    model = AutoModel.from_pretrained(source).to(device).eval()
    processor = AutoImageProcessor.from_pretrained(source)
    size = dict(getattr(processor, "crop_size", None) or processor.size)
    side = size.get("height") or size["shortest_edge"]

    def run(images):
        # The whole image, as FD-DINOv2 is defined: no crop
        inputs = processor(
            list(images.permute(0, 2, 3, 1).numpy()),
            size={"height": side, "width": side},
            do_center_crop=False,
            return_tensors="pt",
        )
        output = model(inputs["pixel_values"].to(device))
        if getattr(output, "pooler_output", None) is None:
            raise ValueError(f"`--feature_extractor` {source!r} gives no pooled features of an image.")
        return output.pooler_output.flatten(1), None

    name = source if not os.path.isdir(source) else Path(source).resolve().name
    return FeatureNetwork(name, tensors_hash(model.state_dict()), run)


def extract_features(network, images_of, count, folder, accelerator):
    """Features `(count, d)` and logits, or None, of all images, by all processes, resumed where they are there.

    Args:
        network: The network.
        images_of: From a range of numbers to uint8 images.
        count: Number of images.
        folder: Where shards are kept, of these images alone.
        accelerator: Its processes share the work.
    """
    folder = Path(folder, network.sha256[:16])
    paths = fill_shards(folder, count, lambda numbers: network(images_of(numbers)), accelerator)
    features, logits = (np.concatenate([read_shard(path, name) for path in paths]) for name in ("features", "logits"))
    return torch.from_numpy(features), torch.from_numpy(logits) if len(logits) else None


def save_statistics(path, network, features, source):
    """Features of a reference, with the network that they are of.

    Args:
        path: `.npz` file to write.
        network: The network.
        features: `(n, d)`.
        source: What the images were, for the record.
    """
    about = json.dumps({"network": network.identity, "images": source})
    covariance = features.double().T.cov().numpy()
    write_npz(
        path, features=features.numpy(), mu=features.double().mean(0).numpy(), sigma=covariance, about=np.array(about)
    )


def load_statistics(path, network):
    """The features of saved statistics, and what the images were.

    Raises:
        ValueError: If they are of another network, or do not say of which.
    """
    with open_npz(path) as file:
        if "about" not in file or "features" not in file:
            raise ValueError(
                f"The statistics {os.fspath(path)!r} do not say of which network they are: compute them from the "
                "images, with --statistics and a file that is not there yet."
            )
        about, features = json.loads(str(file["about"])), file["features"]
    if about["network"] != network.identity:
        raise ValueError(
            f"The statistics {os.fspath(path)!r} are of the network {about['network']['name']} "
            f"({about['network']['sha256'][:12]}), but the samples' features of {network.name} "
            f"({network.sha256[:12]}): distances between two networks mean nothing."
        )
    return torch.from_numpy(features), about["images"]
