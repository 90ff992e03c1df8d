"""The parameter update of one training step, case `optimizer`: WRN-28-2 by SGD, a FlowHead(128, 10) by AdamW.

The gradients are those of the cross-entropies of both classifiers on random images; every update begins by copying
them, as torch.optim overwrites gradients. `bytes` counts one read and one write of gradients, parameters and state.
Providers must agree after three updates before they are timed.
"""

import pytest
import torch
from conftest import DEVICE
from torch.nn import functional as F

from normatch.flows import FlowHead
from normatch.methods.backbones import Classifier, build_backbone
from normatch.methods.classifier import decay_groups
from normatch.training.optim import Optimizer

LR, FLOW_LR, DECAY, CLIP = 0.03, 1e-3, 5e-4, 50.0


def make_model():
    """-> {"classifier", "flow"}, and a gradient for each of their parameters."""
    torch.manual_seed(0)
    networks = {"classifier": Classifier(build_backbone("wrn-28-2"), 10, 32), "flow": FlowHead(128, 10)}
    model = torch.nn.ModuleDict(networks).to(DEVICE, memory_format=torch.channels_last)
    images, labels = torch.randn(64, 3, 32, 32, device=DEVICE), torch.randint(10, (64,), device=DEVICE)
    features, logits = model["classifier"](images.contiguous(memory_format=torch.channels_last))
    loss = F.cross_entropy(logits, labels) + F.cross_entropy(model["flow"](features.detach()).class_log_prob, labels)
    return model, torch.autograd.grad(loss, list(model.parameters()))


def our_step(model, gradients, compiled: bool):
    groups = [{**group, "optimizer": "sgd", "lr": LR} for group in decay_groups(model["classifier"], DECAY)]
    flow = list(model["flow"].parameters())
    groups.append({"params": flow, "optimizer": "adamw", "lr": FLOW_LR, "weight_decay": DECAY, "clip": CLIP})
    optimizer = Optimizer(groups)
    step = torch.compile(optimizer.step, fullgraph=True) if compiled else optimizer.step
    gradient_of = dict(zip(model.parameters(), gradients, strict=True))
    return lambda: step([gradient_of[p] for p in optimizer.trained])


def torch_step(model, gradients):
    flow = list(model["flow"].parameters())
    sgd = torch.optim.SGD(decay_groups(model["classifier"], DECAY), LR, momentum=0.9, nesterov=True, foreach=True)
    adamw = torch.optim.AdamW(flow, FLOW_LR, weight_decay=DECAY, fused=True)
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        p.grad = gradient

    def step():
        torch.nn.utils.clip_grad_norm_(flow, CLIP)
        sgd.step()
        adamw.step()

    return step


PROVIDERS = {
    "torch.optim": torch_step,
    "normatch": lambda *args: our_step(*args, compiled=False),
    "normatch_compiled": lambda *args: our_step(*args, compiled=True),
}


def updated(provider):
    """-> the model after three updates, and the function that makes another."""
    model, original = make_model()
    gradients = [gradient.clone() for gradient in original]
    step = PROVIDERS[provider](model, gradients)

    def update():
        torch._foreach_copy_(gradients, original)
        step()

    for _ in range(3):
        update()
    return model, update


@pytest.mark.parametrize("provider", PROVIDERS)
def test_update(measure, provider):
    model, update = updated(provider)
    expected = updated("torch.optim")[0].state_dict()
    torch.testing.assert_close(model.state_dict(), expected, rtol=1e-4, atol=1e-5)
    classifier, flow = (sum(p.numel() for p in network.parameters()) for network in model.values())
    moved, flop = 4 * (7 * classifier + 9 * flow), 6 * classifier + 15 * flow
    measure("optimizer WRN-28-2 + FlowHead", provider, update, moved, flop)
