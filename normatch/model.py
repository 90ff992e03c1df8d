"""A trained model: load it from a checkpoint of any origin, predict with it, and score it."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pydantic import ValidationError
from torch import nn

from .config import METHODS, method_class
from .data import load_dataset
from .data.base import standardize
from .data.folders import IMAGE_SUFFIXES, fit, read_image
from .data.tables import read_rows
from .errors import UserError
from .flows import FlowOutput
from .methods.backbones import build_backbone
from .methods.base import Method, Task
from .methods.scorer import count, scores
from .published import checkpoints


class Model(nn.Module):
    """A trained method with all that is needed to use it: the averaged weights, the classes, the standardization.

    `method`: a `normatch.methods.base.Method`.   `classes`: the names of its K classes.   `mean`, `std`: of pixels in
    [0, 1], or of a table's columns.   `image_size`: None for a model of a table.   `columns`: the names of the features
    in a table of yours.   `source`: the layout of the published checkpoint it came from, None for our own.
    """

    def __init__(self, method: Method, state: dict):
        super().__init__()
        self.method, self.config = method, method.config
        self.classes, self.mean, self.std = state["classes"], state["mean"], state["std"]
        self.image_size, self.columns = state["image_size"], state["columns"]
        self.source = state.get("source")

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """x: (N, 3, H, W), or rows (N, D), standardized -> (N, K) logits of the first voter."""
        out = next(iter(self.method.class_log_prob(x).values()))
        return out.class_log_prob if isinstance(out, FlowOutput) else out

    @torch.inference_mode()
    def predict_proba(self, images) -> torch.Tensor:
        """images: (N, H, W, 3) uint8, or a list of PIL images or file paths -> (N, K) probabilities.

        A model of a table takes rows (N, D), in the units of the data set, or a list of paths of CSV files.
        """
        if not isinstance(images, (np.ndarray, torch.Tensor)):
            images = np.concatenate([self.read(image) for image in images])
        if isinstance(images, np.ndarray):
            images = torch.from_numpy(np.require(images, requirements="W"))  # copied only if it is read-only
        if self.image_size is None:
            if images.ndim != 2 or images.shape[1] != len(self.mean):
                raise ValueError(f"rows must be (N, {len(self.mean)}), not {tuple(images.shape)}")
        elif images.ndim != 4 or images.shape[-1] != 3 or images.dtype != torch.uint8:
            raise ValueError(f"images must be (N, H, W, 3) uint8, not {tuple(images.shape)} {images.dtype}")
        weight = next(self.method.parameters())
        probabilities = [
            self.logits(standardize(part.to(weight.device), self.mean, self.std, weight.dtype)).softmax(1)
            for part in images.split(500)
        ]
        return torch.cat(probabilities) if probabilities else torch.empty(0, len(self.classes), device=weight.device)

    def predict(self, images) -> torch.Tensor:
        """images: as in `predict_proba` -> (N,) class indices, into `classes`."""
        return self.predict_proba(images).argmax(1)

    def read(self, image) -> np.ndarray:
        """A PIL image or a file's path -> (1, H, W, 3) uint8; for a model of a table, a CSV file's path -> (N, D).

        Raises `UserError` for any other file.
        """
        if self.image_size is None:
            return read_rows(image, len(self.mean), self.columns)
        if not isinstance(image, Image.Image):
            try:
                image = read_image(image)
            except (OSError, ValueError) as error:
                raise UserError(f"{image} cannot be read: {error}") from None
        return fit(image.convert("RGB"), self.image_size)[None]


def load(
    checkpoint: str | Path,
    device: str | torch.device = "cpu",
    dataset: str | None = None,
    method: type[Method] | None = None,
) -> Model:
    """A run folder or a checkpoint file, ours or published -> its model, averaged weights, in evaluation mode.

    A published checkpoint does not say which images it was trained on: it is taken to be the published recipe's for
    such a network and number of classes, unless `dataset` names another (svhn, for instance). `method`: the class of
    your own that the run was trained by.
    """
    return build_model(checkpoints.read(checkpoint, dataset), checkpoint, method).to(device)


def build_model(state: dict, name, method: type[Method] | None = None) -> Model:
    """A checkpoint's state -> the model; `name` is what errors call it, `method` as in `load`."""
    trained_by = state["config"].get("method") if isinstance(state["config"], dict) else None
    if method is None and isinstance(trained_by, str) and trained_by not in METHODS:
        raise UserError(
            f"{name} was trained by a method of yours, which needs its class: load(..., method={trained_by})"
        )
    try:
        cls = method or method_class(trained_by)
        config = cls.Keys(**state["config"])
    except (ValidationError, TypeError, UserError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{name} has a configuration that this version does not know: {reason}") from None
    if state["backbone"] == "given":
        raise UserError(f"{name} was trained on a backbone of yours: build it and load state['ema'] into it")
    networks = {}
    if state.get("transition"):  # of a published wide ResNet, which its configuration does not know
        networks["backbone"] = build_backbone(config.backbone, state["transition"], image_size=state["image_size"])
    built = cls(Task(tuple(state["shape"]), state["classes"], state["gray"]), config, **networks)
    try:
        built.load_state_dict(state["ema"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        network = getattr(config, "backbone", config.method)
        raise UserError(f"the tensors of {name} are not those of a {network}: {reason}") from None
    return Model(built, state).eval().requires_grad_(False)


def evaluate(
    checkpoint: str | Path,
    data_dir: str | None = None,
    device: str | torch.device = "cpu",
    dataset: str | None = None,
    method: type[Method] | None = None,
) -> dict:
    """A run folder or a checkpoint, ours or published -> its scores on a test set, in percent, and its confusions.

    The test set is that of the data set it was trained on, or of `dataset`, which must have as many classes.
    `per_class`: class -> accuracy, None where the set has no image of it. `confusion`: (K, K) counts, a row for each
    true class, a column for each predicted one. `test_balanced_accuracy`: the mean accuracy of the classes.
    `test_log_prob`: the mean log p(x) in nats, where the method has a density. `method`: as in `load`.
    """
    model = load(checkpoint, device, dataset, method)
    config = model.config
    data = load_dataset(
        dataset or config.dataset,
        data_dir or config.data_dir,
        config.download,
        model.image_size,
        config.compat,
        config.in_memory,
    )
    if not len(data.test_labels):
        raise UserError(f"{data.name} has no test images")
    # The names of a published checkpoint's classes are not in the file, so only their number can be compared.
    same = (
        len(data.classes) == len(model.classes)
        if dataset or model.source
        else list(data.classes) == list(model.classes)
    )
    if not same:
        raise UserError(f"the classes of {data.name} are not those of {checkpoint}")
    counts = count(model.method, data.test_x, data.test_labels, model.mean, model.std)
    first = next(iter(counts.values()))
    confusion = first["confusion"]
    right, of_class = confusion.diagonal().tolist(), confusion.sum(1).tolist()
    per_class = [100 * r / n if n else None for r, n in zip(right, of_class, strict=True)]
    seen = [score for score in per_class if score is not None]
    result = {"dataset": data.name, "images": len(data.test_labels), **scores(counts, "test")}
    if len(model.classes) > 5:
        result["test_top5"] = 100 * first["top5"] / len(data.test_labels)
    return {
        **result,
        "test_balanced_accuracy": sum(seen) / len(seen),
        "per_class": dict(zip(data.classes, per_class, strict=True)),
        "confusion": confusion.tolist(),
    }


def find_images(paths) -> list[Path]:
    """Files and folders -> the files, and the image files below the folders in order of name."""
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            below = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
            if not below:
                raise UserError(f"there is no image file below {path}")
            files += below
        else:
            files.append(path)
    return files
