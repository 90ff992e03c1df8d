"""Wide ResNets against the recorded numbers of both published variants; any other module as a backbone."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from normatch.errors import UserError
from normatch.methods.backbones import Classifier, WideResNet, build_backbone, feature_width, mix

# From the table of the recorded files: four times the measured gap between fp32 and fp64 of the published code.
OUTPUT_TOLERANCE = 4 * 6.1e-07
GRADIENT_TOLERANCE = {"kekmodel": 4 * 2.1e-06, "leedoyup": 4 * 3.5e-06}


def recorded_classifier(data, variant):
    depth, widen, classes = (int(data[f"meta/{k}"]) for k in ("depth", "widen", "K"))
    backbone = WideResNet(depth, widen, transition="raw" if variant == "kekmodel" else "activated")
    model = Classifier(backbone, classes)
    published = {k.removeprefix("param/"): torch.tensor(v) for k, v in data.items() if k.startswith("param/")}
    ours = {k if k.startswith("fc.") else f"backbone.{k}": v for k, v in published.items()}
    model.load_state_dict(ours)
    return model


def assert_near(got, want, tolerance):
    got = got.detach().double().numpy()
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= max(tolerance * np.abs(want).max(), 1e-6)


@pytest.mark.parametrize("size", ["16_1", "10_2"])
@pytest.mark.parametrize("variant", ["kekmodel", "leedoyup"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_published_variant_gives_the_recorded_numbers(golden, variant, size, dtype):
    data = golden(f"wrn_{variant}_{size}")
    model = recorded_classifier(data, variant).to(dtype)
    exact = dtype == torch.float64
    output, gradient = (1e-9, 1e-9) if exact else (OUTPUT_TOLERANCE, GRADIENT_TOLERANCE[variant])
    fp32_gradient = GRADIENT_TOLERANCE[variant]
    x, y = torch.tensor(data["in/x"]).to(dtype), torch.tensor(data["in/y"])

    features, logits = model.eval()(x)
    assert_near(features, data["out64/feat_eval"], output)
    assert_near(logits, data["out64/logits_eval"], output)

    features, logits = model.train()(x)
    loss = F.cross_entropy(logits, y)
    loss.backward()
    assert_near(features, data["out64/feat_train"], output)
    assert_near(logits, data["out64/logits_train"], output)
    assert_near(loss, data["out64/ce_train"], output)

    without = set()
    for name, parameter in model.named_parameters():
        name = name.removeprefix("backbone.")
        if parameter.grad is None:
            without.add(name)
        else:  # large tensors are recorded in fp32 only, or as their first output channels
            keys = (f"grad64/{name}", f"grad_first16_64/{name}", f"grad/{name}", f"grad_first16/{name}")
            key = next(k for k in keys if k in data)
            in_fp64 = "64/" in key
            assert_near(parameter.grad[: len(data[key])], data[key], gradient if in_fp64 else fp32_gradient)
    published = set(np.atleast_1d(data["meta/params_without_grad"]).tolist()) - {""}
    assert without == {name.removeprefix("module.") for name in published}

    for key in (k for k in data if k.startswith("out/buffer_after/")):
        # Only fp32 buffers are recorded.
        assert_near(model.backbone.get_buffer(key.removeprefix("out/buffer_after/")), data[key], OUTPUT_TOLERANCE)


@pytest.mark.parametrize(("name", "count"), [("wrn-28-2", 1_467_610), ("wrn-28-8", 23_400_000), ("wrn-10-1", 77_850)])
def test_parameter_count(name, count):
    model = Classifier(build_backbone(name), 10)
    total = sum(p.numel() for p in model.parameters())
    if name == "wrn-28-8":  # recorded with 100 classes: 23,401,012
        total += 90 * (512 + 1)
        count = 23_401_012
    assert total == count


def test_four_stages_for_96_pixels():
    backbone = WideResNet(37, 2)
    convolutions = sum(isinstance(m, nn.Conv2d) for m in backbone.modules())
    assert convolutions == 37
    assert feature_width(backbone, 96) == backbone.features == 256


def test_variants_differ():
    torch.manual_seed(0)
    plain, raw = WideResNet(10, 2), WideResNet(10, 2, transition="raw")
    raw.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert not torch.allclose(plain.eval()(x), raw.eval()(x))


@pytest.mark.parametrize(
    ("name", "width"), [("resnet18", 512), ("resnet50", 2048), ("torchvision:mobilenet_v3_small", 1024)]
)
def test_torchvision_backbone_width(name, width):
    pytest.importorskip("torchvision", reason="torchvision does not import beside this torch", exc_type=Exception)
    assert Classifier(build_backbone(name), 7).features == width


def test_any_module_is_a_backbone():
    maps = nn.Conv2d(3, 5, 3)
    model = Classifier(maps, 4, image_size=9)
    features, logits = model(torch.randn(6, 3, 9, 9))
    assert features.shape == (6, 5) and logits.shape == (6, 4)


def test_finding_the_width_changes_nothing():
    backbone = WideResNet(10, 1)
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    feature_width(backbone)
    assert backbone.training
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())


def test_batch_norm_momentum_reaches_every_layer():
    for module in build_backbone("wrn-10-1", bn_momentum=0.03).modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.momentum == 0.03


@pytest.mark.parametrize("name", ["wrn-28", "wrn-27-2", "wrn-a-b", "resnet19", "torchvision:none", "hub:x", "wrn-28-0"])
def test_unknown_backbone_is_a_user_error(name):
    with pytest.raises(UserError):
        build_backbone(name)


def test_backbone_with_wrong_output_is_a_user_error():
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(UserError, match="tuple"):
        Classifier(Pair(), 10)


def test_mixing_mixes_channels_in_half_of_the_batches_of_training():
    x = torch.rand(4, 6, 3, 3) + 0.1
    results = [mix(x) for _ in range(200)]
    mixed = [y for y in results if not torch.equal(y, x)]
    assert 60 < len(mixed) < 140
    for y in mixed:  # positive features: a x + (1 - a) x', whose sum over the channels stays
        assert torch.allclose(y.sum(1), x.sum(1), rtol=1e-5)
    x.requires_grad_()
    torch.manual_seed(3)
    gradients = [torch.autograd.grad(mix(x).sum(), x)[0] for _ in range(50)]
    shares = {round(g[0, 0, 0, 0].item(), 4) for g in gradients}
    assert max(shares) == 1 and 0.5 <= min(shares) < 1  # the mixed-in channels have no gradient
    backbone = build_backbone("wrn-10-1", mixing=True)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(backbone.eval()(images), backbone(images))
    with pytest.raises(UserError, match="mixing"):
        build_backbone("resnet18", mixing=True)
