"""The checkpoints of NorMatch (one and two flows), kekmodel's FixMatch and LeeDoYup's FixMatch -> our state."""

import torch

from .. import __version__
from ..config import checked
from ..data.vision import NORMALIZATION
from ..errors import UserError
from ..flows import SCNF, FlowHead
from ..flows.flow import load_weights

# layout -> the averaged and the trained network, in the order in which they are looked for
NETWORKS = {
    "normatch": ("ema_state_dict", "state_dict"),
    "kekmodel": ("ema_state_dict", "state_dict"),
    "leedoyup": ("eval_model", "train_model"),
}

# A published checkpoint does not say what its images were: data set -> classes, image size, mean, std.
_SIZES = {"cifar10": (10, 32), "cifar100": (100, 32), "svhn": (10, 32), "stl10": (10, 224), "miniimagenet": (100, 84),
          "imagenet": (1000, 224)}  # fmt: skip
IMAGES = {name: (*sizes, *NORMALIZATION[name]) for name, sizes in _SIZES.items()}
LEEDOYUP_IMAGES = {
    "cifar10": (10, 32, tuple(v / 255 for v in (125.3, 123.0, 113.9)), tuple(v / 255 for v in (63.0, 62.1, 66.7))),
    "cifar100": (100, 32, tuple(v / 255 for v in (129.3, 124.1, 112.4)), tuple(v / 255 for v in (68.2, 65.4, 70.4))),
}
# (residual network?, classes) -> the data set that the publications trained it on
USUAL = {
    (False, 10): "cifar10",
    (False, 100): "cifar100",
    (True, 10): "stl10",
    (True, 100): "miniimagenet",
    (True, 1000): "imagenet",
}
CLASSES = {
    "cifar10": "airplane automobile bird cat deer dog frog horse ship truck",
    "stl10": "airplane bird car cat deer dog horse monkey ship truck",
    "cifar100": "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly "
    "camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur "
    "dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard "
    "lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear "
    "pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark "
    "shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone "
    "television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm",
}
# blocks in each of the four stages, bottlenecks? -> the residual network's name
RESNETS = {
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "torchvision:resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "torchvision:resnet101",
    ((3, 8, 36, 3), True): "torchvision:resnet152",
}


def from_published(content: dict, dataset: str | None = None) -> dict:
    """What a published repository saved -> the state in our layout. Raises `UserError` where it is none of those."""
    layout = _layout(content)
    averaged, trained = _networks(content, layout)
    head = "fc1" if "fc1.weight" in averaged else "fc"  # NorMatch's residual networks call it fc1
    if f"{head}.weight" not in averaged or averaged[f"{head}.weight"].ndim != 2:
        raise UserError("this is not a classifier of a published layout: it has no linear layer 'fc'")
    classes = len(averaged[f"{head}.weight"])
    backbone, residual = _backbone(averaged)
    transition = _transition(trained, content.get("optimizer"), layout)
    dataset, image_size, mean, std = _images(layout, residual, classes, dataset)

    flows = [_flow(content, suffix) for suffix in ("", "2") if content.get(f"flow{suffix}_state_dict") is not None]
    config = {
        "method": "normatch" if flows else "fixmatch",
        "dataset": dataset,
        "backbone": backbone,
        # LeeDoYup's network and thresholds are those of the paper; NorMatch's and kekmodel's differ.
        "compat": "none" if layout == "leedoyup" else "reference",
    }
    networks = {}
    if flows:
        config["third_voter"] = "flow" if len(flows) == 2 else "none"
        config |= {"couplings": len(flows[0].couplings), "hidden": flows[0].couplings[0].net[0].out_features}
        networks = {f"flows.{i}.{name}": v for i, flow in enumerate(flows) for name, v in flow.state_dict().items()}
    config = checked(config)
    if flows:
        networks["da_queue"] = torch.zeros(config.da_window, classes)
    return {
        "format": 2,
        "normatch": __version__,
        "config": config.model_dump(),
        "backbone": "named",
        "transition": transition,
        "source": layout,
        "classes": CLASSES[dataset].split() if dataset in CLASSES else [str(k) for k in range(classes)],
        "mean": list(mean),
        "std": list(std),
        "image_size": image_size,
        "shape": [3, image_size, image_size],
        "gray": False,
        "columns": [],
        # The published code averages the network alone: the flow is the live one in both.
        "model": {**_classifier(trained, head), **networks},
        "ema": {**_classifier(averaged, head), **networks},
    }


def _layout(content: dict) -> str:
    if content.get("flow_state_dict") is not None:
        return "normatch"
    if "state_dict" in content or "ema_state_dict" in content:
        return "kekmodel"
    if "eval_model" in content or "train_model" in content:
        return "leedoyup"
    if content and all(isinstance(value, torch.Tensor) for value in content.values()):
        return "bare"  # the state dict of a network, without anything around it
    raise UserError(
        "this is not a checkpoint of normatch, nor of a published layout (NorMatch, kekmodel or LeeDoYup FixMatch)"
    )


def _networks(content: dict, layout: str) -> tuple[dict, dict]:
    """-> the averaged and the trained network, name -> tensor, without the `module.` of parallel wrappers."""
    if layout == "bare":
        networks = [content]
    else:
        networks = [content[key] for key in NETWORKS[layout] if content.get(key) is not None]
    for network in networks:
        if not isinstance(network, dict) or not all(isinstance(value, torch.Tensor) for value in network.values()):
            raise UserError("the network in it is not a dictionary of tensors")
    if not networks:
        raise UserError("there is no network in it")
    plain = [{_without_wrapper(name): value.detach() for name, value in network.items()} for network in networks]
    return plain[0], plain[-1]


def _without_wrapper(name) -> str:
    name = str(name)
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def _backbone(network: dict) -> tuple[str, bool]:
    """-> the backbone's name, from the names and shapes of its tensors, and whether it is a plain residual network."""

    def count(prefix):
        return len({name.removeprefix(prefix).split(".")[0] for name in network if name.startswith(prefix)})

    if "block1.layer.0.conv1.weight" in network:
        blocks = count("block1.layer.")
        depth = 8 * blocks + 5 if "block4.layer.0.conv1.weight" in network else 6 * blocks + 4
        return f"wrn-{depth}-{len(network['block1.layer.0.conv1.weight']) // 16}", False
    shape = tuple(count(f"layer{stage}.") for stage in (1, 2, 3, 4)), "layer1.0.conv3.weight" in network
    if shape in RESNETS:
        return RESNETS[shape], True
    raise UserError("its network is neither a wide ResNet nor one of torchvision's ResNets")


def _transition(trained: dict, optimizer, layout: str) -> str:
    """Which of the two published wide ResNets this is. Their state dicts have the same names and shapes.

    NorMatch's and kekmodel's network throws act(bn1(x)) away where the second and third stage begin, LeeDoYup's uses
    it. What is thrown away gets no gradient. So the optimizer of the former has no momentum for those four tensors,
    and after training their shifts still are the zeros they began as (normalization layers are not decayed), while
    any step moves them in the latter. The optimizer is asked first: it also tells a copy of kekmodel's code in which
    somebody has fixed the block. Without one, the keys of the file say whose code wrote it, and for a bare state
    dict the shift decides.
    """
    shift = trained.get("block2.layer.0.bn1.bias")
    if shift is None:
        return "activated"  # not a wide ResNet
    untouched = not shift.any()
    if optimizer and optimizer["state"]:
        parameters = sum(len(group["params"]) for group in optimizer["param_groups"])
        return "raw" if untouched or len(optimizer["state"]) < parameters else "activated"
    if layout == "bare":
        return "raw" if untouched else "activated"
    return "activated" if layout == "leedoyup" else "raw"


def _images(layout: str, residual: bool, classes: int, dataset: str | None):
    """-> data set, image size, mean, std. LeeDoYup's networks, residual ones too, all saw 32-pixel CIFAR images."""
    known = {**IMAGES, **LEEDOYUP_IMAGES} if layout == "leedoyup" else IMAGES
    usual = USUAL.get((residual and layout != "leedoyup", classes))
    name = dataset if dataset in known else usual
    if name is None:
        raise UserError(
            f"it has {classes} classes, which is none of the published data sets: "
            f"name the one it was trained on with --dataset, one of {', '.join(known)}"
        )
    if known[name][0] != classes:
        raise UserError(f"it has {classes} classes, {name} has {known[name][0]}")
    return name, *known[name][1:]


def _flow(content: dict, suffix: str) -> FlowHead:
    """The first (suffix "") or second ("2") flow of a NorMatch checkpoint."""
    parts = [f"flow{suffix}_state_dict", *(f"flow_{part}{suffix}" for part in ("mean", "std", "weights"))]
    return FlowHead.from_reference(*(content[part] for part in parts))  # "std" holds rho, sigma = softplus(rho)


def _classifier(network: dict, head: str) -> dict:
    """The published names -> those of our classifier: a backbone, and a linear layer `fc`."""

    def ours(name):
        return f"fc{name.removeprefix(head)}" if name.startswith(f"{head}.") else f"backbone.{name}"

    return {f"classifier.{ours(name)}": value for name, value in network.items()}


def first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def load_flow(density, content: dict):
    """Give a density the weights of FlowGMM's or SCNF's published checkpoint. Raises `UserError` if they do not fit."""
    if isinstance(density, SCNF):
        density.load_published(content)
        return
    net = content.get("net", content)
    density.flow.load_published({name.removeprefix("module."): value for name, value in net.items()})
    if "means" in content:
        load_weights(density.prior, {**density.prior.state_dict(), "means": content["means"].detach()}, "prior")
