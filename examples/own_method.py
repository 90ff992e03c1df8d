"""A method of your own in one class: mean teacher (Tarvainen & Valpola 2017) without its teacher, the Pi-model.

python examples/own_method.py
"""

import torch
from torch import nn
from torch.nn import functional as F

import normatch
from normatch.config import Config, Positive, Weight, key
from normatch.methods.terms import average, ramp


class PiModel(normatch.Method):
    """L = cross-entropy on labeled images + lambda_u r |p(strong view) - p(weak view)|^2, r rising over 100 steps."""

    class Keys(Config):
        lambda_u: Weight = key(10.0, "weight of the consistency between views")
        uratio: Positive = key(4, "unlabeled images per labeled one")

    def __init__(self, task, config):
        super().__init__(task, config)
        pixels, classes = torch.Size(task.shape).numel(), len(task.classes)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(pixels, 256), nn.ReLU(), nn.Linear(256, classes))

    def forward(self, batch, step):
        b, u = len(batch["y"]), len(batch["u_y"])
        labeled, weak, strong = self.net(batch["images"]).split((b, u, u))
        loss_x = F.cross_entropy(labeled, batch["y"])
        loss_u = (strong.softmax(1) - weak.softmax(1).detach()).square().sum(1).mean()
        loss = loss_x + self.config.lambda_u * ramp(step, 100) * loss_u
        return loss, {"loss_x": average(loss_x), "loss_u": average(loss_u)}

    def class_log_prob(self, x):
        return {"net": self.net(x)}

    def groups(self):
        return [{"params": list(self.parameters()), "optimizer": "adamw", "lr": 1e-3, "weight_decay": 1e-2}]


if __name__ == "__main__":
    normatch.train("digits", method=PiModel, steps=600, eval_every=200, out="runs/own-method")
