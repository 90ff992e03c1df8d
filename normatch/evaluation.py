"""After training: accuracy on a data set, a checkpoint as a model, predictions for image files."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import nn

from .augment import normalize
from .backbones import Classifier, build_backbone
from .config import Config
from .data import load_dataset
from .errors import UserError
from .methods import METHODS
from .run import load_checkpoint

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


class Model(nn.Module):
    """A trained classifier with all that is needed to use it: the averaged weights, the classes, the normalisation.

    `classifier(x) -> features, logits`; `flows`: the flow heads, empty for methods without one.
    """

    def __init__(self, classifier, flows, classes: list[str], mean, std, image_size: int, config: Config):
        super().__init__()
        self.classifier, self.flows = classifier, flows
        self.classes, self.mean, self.std, self.image_size, self.config = (
            classes,
            mean,
            std,
            image_size,
            config,
        )

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """x: (N, 3, H, W), normalised -> (N, K) logits of the linear classifier."""
        return self.classifier(x)[1]

    @torch.inference_mode()
    def predict_proba(self, images) -> torch.Tensor:
        """images: (N, H, W, 3) uint8, or a list of PIL images or file paths -> (N, K) probabilities."""
        if not isinstance(images, (np.ndarray, torch.Tensor)):
            images = np.stack([self._read(image) for image in images])
        images = torch.as_tensor(images)
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != torch.uint8:
            raise ValueError(f"images must be (N, H, W, 3) uint8, not {tuple(images.shape)} {images.dtype}")
        device = self.classifier.fc.weight.device
        parts = [self.logits(normalize(part.to(device), self.mean, self.std)).softmax(1) for part in images.split(500)]
        return torch.cat(parts) if parts else torch.empty(0, len(self.classes), device=device)

    def predict(self, images) -> torch.Tensor:
        """images: as in `predict_proba` -> (N,) class indices, into `classes`."""
        return self.predict_proba(images).argmax(1)

    def _read(self, image):
        if not isinstance(image, Image.Image):
            image = read_image(image)
        size = (self.image_size, self.image_size)
        return np.asarray(image.convert("RGB").resize(size, Image.Resampling.BILINEAR))


def read_image(path: str | Path) -> Image.Image:
    """An image file -> a PIL image, decoded. Raises `UserError` where it is not one."""
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except FileNotFoundError:
        raise UserError(f"there is no image {path}") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is not an image that can be read: {error}") from None


def load(checkpoint: str | Path, device: str | torch.device = "cpu") -> Model:
    """A run folder or a checkpoint file -> its model, with the averaged weights, in evaluation mode."""
    state = load_checkpoint(checkpoint)
    config = Config(**state["config"])
    if state["backbone"] != "named":
        raise UserError(f"{checkpoint} was trained on a backbone of your own: build it and load state['ema'] into it")
    transition = "raw" if config.compat == "reference" else "activated"
    backbone = build_backbone(config.backbone, transition, config.bn_momentum, state["image_size"])
    classifier = Classifier(backbone, len(state["classes"]), state["image_size"])
    method = METHODS[config.method](classifier.features, len(state["classes"]), config)
    weights = dict(state["ema"])
    if config.compat == "reference":  # the published flow is not averaged
        weights.update({k: v for k, v in state["model"].items() if k.startswith("method.")})
    nn.ModuleDict({"classifier": classifier, "method": method}).load_state_dict(weights)
    model = Model(classifier, method.flows, state["classes"], state["mean"], state["std"], state["image_size"], config)
    return model.eval().requires_grad_(False).to(device)


def evaluate(checkpoint: str | Path, data_dir: str | None = None, device: str | torch.device = "cpu") -> dict:
    """A run folder or a checkpoint -> its accuracy on the test set of the data set it was trained on, in percent."""
    model = load(checkpoint, device)
    config = model.config
    dataset = load_dataset(config.dataset, data_dir or config.data_dir, config.download)
    if list(dataset.classes) != list(model.classes):
        raise UserError(f"the classes of {config.dataset} are not those of {checkpoint}")
    scores = accuracy(model.classifier, model.flows, dataset.test_images, dataset.test_labels, model.mean, model.std)
    return {"dataset": dataset.name, "images": len(dataset.test_labels), **scores}


@torch.inference_mode()
def accuracy(classifier, flows, images, labels, mean, std, prefix="test", batch_size=500) -> dict:
    """images: (N, H, W, 3) uint8, labels: (N,) -> {`PREFIX_accuracy`, `PREFIX_accuracy_flow` if there is a flow}, %.

    `classifier` and `flows` must be in evaluation mode. One pass; the counts are read back once, at its end.
    """
    device = classifier.fc.weight.device
    images, labels = torch.from_numpy(images), torch.from_numpy(labels)
    right = torch.zeros(2, dtype=torch.long, device=device)
    for part, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        y = y.to(device)
        features, logits = classifier(normalize(part.to(device), mean, std))
        right[0] += (logits.argmax(1) == y).sum()
        if len(flows):
            right[1] += (flows[0](features).class_log_prob.argmax(1) == y).sum()
    linear, flow = (100 * right / len(labels)).tolist()
    scores = {f"{prefix}_accuracy": linear}
    if len(flows):
        scores[f"{prefix}_accuracy_flow"] = flow
    return scores


def find_images(paths) -> list[Path]:
    """Files and folders -> the files, and the image files below the folders in order of name."""
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            below = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
            if not below:
                raise UserError(f"there is no image file below {path}")
            found += below
        else:
            found.append(path)
    return found
