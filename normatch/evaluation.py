"""After training: accuracy on a data set, a checkpoint as a model, predictions for image files."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pydantic import ValidationError
from torch import nn
from torch.nn import functional as F

from . import distributed, published
from .augment.pillow import normalize
from .backbones import Classifier, build_backbone
from .config import Config
from .data import load_dataset
from .errors import UserError
from .flow_training import FLOW_METHODS, make_objective
from .folders import IMAGE_SUFFIXES, fit, read_image
from .methods import METHODS
from .tables import Table, read_rows


class Model(nn.Module):
    """A trained classifier with all that is needed to use it: the averaged weights, the classes, the normalisation.

    `classifier(x) -> features, logits`, of a flow with its prior a `FlowAsClassifier`; `flows`: the flow heads, empty
    for methods without one. `source`: the layout of the published checkpoint that it came from, None for our own.
    `image_size` is None for a model of a table, and `columns` the names of the features of one's own.
    """

    def __init__(
        self,
        classifier,
        flows,
        classes: list[str],
        mean,
        std,
        image_size: int,
        config: Config,
        source: str | None = None,
        columns=(),
    ):
        super().__init__()
        self.classifier, self.flows = classifier, flows
        self.classes, self.mean, self.std = classes, mean, std
        self.image_size, self.config, self.source, self.columns = image_size, config, source, columns

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """x: (N, 3, H, W), or of a table (N, D), normalised -> (N, K) logits."""
        return self.classifier(x)[1]

    @torch.inference_mode()
    def predict_proba(self, images) -> torch.Tensor:
        """images: (N, H, W, 3) uint8, or a list of PIL images or file paths -> (N, K) probabilities.

        Of a model of a table: rows (N, D), in the units of the data set, or a list of paths of CSV files of rows.
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
        weight = next(self.classifier.parameters())
        device = weight.device
        parts = [self.logits(_normalized(part, self.mean, self.std, weight)).softmax(1) for part in images.split(500)]
        return torch.cat(parts) if parts else torch.empty(0, len(self.classes), device=device)

    def predict(self, images) -> torch.Tensor:
        """images: as in `predict_proba` -> (N,) class indices, into `classes`."""
        return self.predict_proba(images).argmax(1)

    def read(self, image) -> np.ndarray:
        """A PIL image or a file's path -> (1, H, W, 3) uint8; of a table's model a CSV file's path -> (N, D).

        Raises UserError for any other file.
        """
        if self.image_size is None:
            return read_rows(image, len(self.mean), self.columns)
        if not isinstance(image, Image.Image):
            try:
                image = read_image(image)
            except (OSError, ValueError) as error:
                raise UserError(f"{image} cannot be read: {error}") from None
        return fit(image.convert("RGB"), self.image_size)[None]


def load(checkpoint: str | Path, device: str | torch.device = "cpu", dataset: str | None = None) -> Model:
    """A run folder or a checkpoint file, ours or published -> its model, averaged weights, in evaluation mode.

    A published checkpoint does not say which images it was trained on: it is taken to be the published recipe's for
    such a network and number of classes, unless `dataset` names another (svhn, for instance).
    """
    return build_model(published.read(checkpoint, dataset), checkpoint).to(device)


def build_model(state: dict, name) -> Model:
    """A checkpoint's state -> the model; `name` is what to call it in errors."""
    try:
        config = Config(**state["config"])
    except (ValidationError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{name} has a configuration that this version does not know: {reason}") from None
    if config.method in FLOW_METHODS:
        return build_flow(state, config, name)
    if state["backbone"] != "named":
        raise UserError(f"{name} was trained on a backbone of your own: build it and load state['ema'] into it")
    transition = state.get("transition") or ("raw" if config.compat == "reference" else "activated")
    backbone = build_backbone(config.backbone, transition, config.bn_momentum, state["image_size"])
    classifier = Classifier(backbone, len(state["classes"]), state["image_size"])
    method = METHODS[config.method](classifier.features, len(state["classes"]), config)
    try:
        nn.ModuleDict({"classifier": classifier, "method": method}).load_state_dict(used_weights(state))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the tensors of {name} are not those of a {config.backbone}: {reason}") from None
    model = Model(
        classifier,
        method.flows,
        state["classes"],
        state["mean"],
        state["std"],
        state["image_size"],
        config,
        state.get("source"),
    )
    return model.eval().requires_grad_(False)


class FlowAsClassifier(nn.Module):
    """x: (N, 3, H, W) or (N, D), normalised -> z (N, D'), log p(z, y) (N, K): a density in a classifier's place."""

    def __init__(self, density: nn.Module, shape):
        super().__init__()
        self.density, self.shape = density, tuple(shape)  # of a sample, as the density takes it

    def forward(self, x):
        if len(self.shape) == 3:
            x = x[:, : self.shape[0]]
        elif x.ndim == 4:  # pixels as a row: of one channel, where they are no more
            x = x[:, : self.shape[0] // (x.shape[2] * x.shape[3])].flatten(1)
        out = self.density(x)
        return out.z, out.class_log_prob


def build_flow(state: dict, config: Config, name) -> Model:
    """The state of a flow's checkpoint -> its model. Raises UserError for tensors of another architecture."""
    objective = make_objective(config, tuple(state["shape"]), len(state["classes"]))
    try:
        objective.load_state_dict(used_weights(state))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the tensors of {name} are not those of its configuration: {reason}") from None
    classifier = FlowAsClassifier(objective.model, state["shape"])
    facts = (state[name] for name in ("classes", "mean", "std", "image_size"))
    model = Model(classifier, (), *facts, config, columns=state.get("columns", ()))
    return model.eval().requires_grad_(False)


def _normalized(samples: torch.Tensor, mean, std, like: torch.Tensor) -> torch.Tensor:
    """samples: (N, H, W, 3) uint8 or (N, D) -> what a model takes, on the device and of the dtype of `like`."""
    if samples.ndim == 4:
        return normalize(samples.to(like.device), mean, std, like.dtype)
    mean, std = (torch.as_tensor(v, dtype=like.dtype, device=like.device) for v in (mean, std))
    return (samples.to(mean) - mean) / std


def used_weights(state: dict) -> dict:
    """The weights that are evaluated: the averaged ones, except that the published flow is not averaged."""
    weights = dict(state["ema"])
    if state["config"]["compat"] == "reference":
        weights.update({name: value for name, value in state["model"].items() if name.startswith("method.")})
    return weights


def evaluate(
    checkpoint: str | Path,
    data_dir: str | None = None,
    device: str | torch.device = "cpu",
    dataset: str | None = None,
) -> dict:
    """A run folder or a checkpoint, ours or published -> its scores on a test set, in percent, and its confusions.

    The test set is that of the data set it was trained on, or of `dataset`, which must have as many classes.
    `per_class`: class -> accuracy, None where the set has no image of it. `confusion`: (K, K) counts, a row for each
    true class, a column for each predicted one. `test_balanced_accuracy`: the mean accuracy of the classes.
    """
    model = load(checkpoint, device, dataset)
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
    samples = data.test_x if isinstance(data, Table) else data.test_images
    counts = count(model.classifier, model.flows, samples, data.test_labels, model.mean, model.std)
    confusion = counts["confusion"]
    right, of_class = confusion.diagonal().tolist(), confusion.sum(1).tolist()
    per_class = [100 * r / n if n else None for r, n in zip(right, of_class, strict=True)]
    seen = [score for score in per_class if score is not None]
    scores = {"dataset": data.name, "images": len(data.test_labels), **_scores(counts, "test")}
    if len(model.classes) > 5:
        scores["test_top5"] = 100 * counts["top5"] / len(data.test_labels)
    return {
        **scores,
        "test_balanced_accuracy": sum(seen) / len(seen),
        "per_class": dict(zip(data.classes, per_class, strict=True)),
        "confusion": confusion.tolist(),
    }


def accuracy(classifier, flows, images, labels, mean, std, prefix="test", batch_size=500) -> dict:
    """images: (N, H, W, 3) uint8, labels: (N,) -> {`PREFIX_accuracy`, %; the flow's, if there is one; `PREFIX_loss`}.

    `classifier` and `flows` must be in evaluation mode.
    """
    return _scores(count(classifier, flows, images, labels, mean, std, batch_size), prefix)


@torch.inference_mode()
def count(classifier, flows, images, labels, mean, std, batch_size=500) -> dict:
    """images: (N, H, W, 3) uint8, labels: (N,) -> `confusion` (K, K), the flow's if there is one, `top5`, `loss`.

    `loss`: the mean cross-entropy of the linear classifier, nats. Or rows of a table for images, (N, D).
    A row of a confusion matrix is a true class, a column a predicted one. One pass; read back once, at its end.
    """
    weight = next(classifier.parameters())
    own = slice(distributed.rank(), None, distributed.ranks())  # of several processes each takes its share
    images, labels = torch.from_numpy(images)[own], torch.from_numpy(labels)[own]
    matrices = None
    top5 = torch.zeros((), dtype=torch.long, device=weight.device)
    loss = torch.zeros((), dtype=torch.float64, device=weight.device)
    for part, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        y = y.to(weight.device)
        features, logits = classifier(_normalized(part, mean, std, weight))
        if matrices is None:
            k = logits.shape[1]
            matrices = torch.zeros(2, k * k, dtype=torch.long, device=weight.device)
        matrices[0].index_add_(0, k * y + logits.argmax(1), torch.ones_like(y))
        top5 += (logits.topk(min(5, k)).indices == y[:, None]).sum()
        loss += F.cross_entropy(logits, y, reduction="sum")
        if len(flows):
            choice = flows[0](features).class_log_prob.argmax(1)
            matrices[1].index_add_(0, k * y + choice, torch.ones_like(y))
    linear, flow = distributed.sum_(matrices).view(2, k, k).cpu()
    counts = {"confusion": linear, "top5": distributed.sum_(top5).item()}
    counts["loss"] = distributed.sum_(loss).item() / max(1, linear.sum().item())
    return {**counts, "confusion_flow": flow} if len(flows) else counts


def _scores(counts: dict, prefix: str) -> dict:
    names = {"confusion": f"{prefix}_accuracy", "confusion_flow": f"{prefix}_accuracy_flow"}
    found = {name: counts[key] for key, name in names.items() if key in counts}
    scores = {name: 100 * matrix.trace().item() / matrix.sum().item() for name, matrix in found.items()}
    return {**scores, f"{prefix}_loss": counts["loss"]}


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
