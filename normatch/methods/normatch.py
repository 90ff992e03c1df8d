"""NorMatch (Deng et al. 2024, TMLR, arXiv 2211.09593): a linear and a flow classifier vote on the pseudo-labels.

NCUE, the consensus weighting, has no confidence threshold: an unlabeled image counts fully where the voters agree on
its class, and where they do not, by the confidence of the least confident voter. NUM, the unlabeled maximum-likelihood
term, fits the flow to the density of unlabeled features.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from ..config import NonNegative, Positive, Weight, key
from ..flows import FlowHead
from .classifier import ImageClassifier
from .fixmatch import PseudoLabelKeys
from .terms import align, average, ramp


class NorMatchKeys(PseudoLabelKeys):
    """NorMatch's settings."""

    dist_align: bool = key(True, "align the pseudo-labels with the uniform class distribution")
    da_window: Positive = key(32, "batches in the alignment window")
    lambda_flow: Weight = key(1.0, "weight of the flow's cross-entropy on labeled images")
    lambda_flow_unsup: Weight = key(1e-6, "weight of NUM, the flow's negative log-likelihood, nats")
    warmup_flow: NonNegative = key(5120, "steps over which the flow losses rise to their weight")
    third_voter: Literal["none", "flow", "sampled"] = key(
        "none", "let a second flow, or a sampled linear classifier, vote too"
    )
    couplings: Positive = key(6, "couplings of the flow head")
    hidden: Positive = key(32, "width of the couplings' networks")
    dropout: Annotated[float, Field(ge=0, lt=1)] = key(0.5, "dropout in the couplings' networks")
    trainable_prior: bool = key(True, "train the means, widths and shares of the mixture")
    flow_lr: Weight = key(1e-3, "learning rate of AdamW on the flow")
    clip: Weight = key(50.0, "largest gradient norm of the flow; 0: no clipping")

    @property
    def one_hot(self):
        return self.third_voter != "none" if self.hard_label is None else self.hard_label

    @property
    def variant(self):
        return self.method if self.third_voter == "none" else f"{self.method}-{self.third_voter}"


class NorMatch(ImageClassifier):
    """batch: images (B + 2 N_u, 3, H, W), y (B,), u_y (N_u,) -> loss, metrics.

    The images are the labeled ones, the weak and the strong views of the unlabeled ones.

        L = L_x + lambda_u L_u + r (lambda_flow L_f + lambda_flow_unsup L_n)

    L_x: cross-entropy of the linear classifier on labeled images. L_u: cross-entropy on strong views, weighted by NCUE.
    L_f: cross-entropy of the flow's class posterior on labeled features. L_n, NUM: negative log-likelihood of unlabeled
    features under the flow. r rises from 0 to 1 over the first `warmup_flow` steps. The flow sees detached features and
    never strong views, so the backbone learns from L_x and L_u alone.

    u_y, the true labels where they are known and -1 where not, only enters the metrics.
    """

    Keys = NorMatchKeys

    def __init__(self, task, config, backbone=None):
        super().__init__(task, config, backbone)
        self.flows = nn.ModuleList(
            FlowHead(
                self.classifier.features,
                len(task.classes),
                config.couplings,
                config.hidden,
                config.dropout,
                trainable_prior=config.trainable_prior,
                compat=config.compat,
            )
            for _ in range(2 if config.third_voter == "flow" else 1)
        )
        self.register_buffer("da_queue", torch.zeros(config.da_window, len(task.classes)))

    def forward(self, batch, step):
        config, y, u_y = self.config, batch["y"], batch["u_y"]
        n, reference = len(u_y), config.compat == "reference"
        features, logits = self.classify(batch["images"])
        logits_x, logits_weak, logits_strong = logits.split((len(y), n, n))

        # One pass of each flow over the labeled images and the weak views.
        outputs = [flow(features[: len(y) + n].detach()) for flow in self.flows]
        votes = [out.class_log_prob[len(y) :] for out in outputs]
        if config.third_voter == "sampled":
            votes.append(sampled_classifier(self.flows[0], outputs[0].z[len(y) :]))
        q = (logits_weak.detach() / config.T).softmax(1)
        if config.dist_align:
            q, queue = align(q, self.da_queue)
            self.da_queue.copy_(queue)
        weight, pseudo_label, agree = consensus(q, votes, detach=not reference)  # NCUE

        loss_x = F.cross_entropy(logits_x, y)
        target = pseudo_label if config.one_hot else q
        loss_u = (F.cross_entropy(logits_strong, target, reduction="none") * weight).mean()
        loss_f = sum(F.cross_entropy(out.class_log_prob[: len(y)], y) for out in outputs) / len(outputs)
        loss_n = -outputs[0].log_prob[len(y) :].mean()  # NUM
        r = ramp(step, config.warmup_flow, staircase=reference)
        loss = loss_x + config.lambda_u * loss_u + r * (config.lambda_flow * loss_f + config.lambda_flow_unsup * loss_n)

        losses = {"loss_x": loss_x, "loss_u": loss_u, "loss_flow": loss_f, "loss_flow_unsup": loss_n}
        metrics = {name: average(value) for name, value in losses.items()}
        return loss, metrics | self.vote_metrics(q, votes[0], weight, pseudo_label, agree, u_y)

    def vote_metrics(self, q, vote, weight, pseudo_label, agree, u_y) -> dict:
        """q, vote: (N_u, K), the rest (N_u,) -> how the voters and the pseudo-labels do."""
        confidence = q.amax(1)
        high = confidence >= self.config.p_cutoff
        right, known = pseudo_label == u_y, u_y >= 0
        return {
            "mask_ratio": average(weight),
            "consensus_ratio": average(agree),
            "high_confidence_ratio": average(high),
            "disagreement_weight": average(weight, ~agree),
            "confidence": average(confidence),
            "flow_confidence": average(vote.softmax(1).amax(1)),
            "pseudo_label_accuracy": average(right, known),
            "pseudo_label_accuracy_consensus": average(right, known & agree),
            "pseudo_label_accuracy_disagreement": average(right, known & ~agree),
            "pseudo_label_accuracy_high_confidence": average(right, known & high),
            "flow_pseudo_label_accuracy": average(vote.argmax(1) == u_y, known),
        }

    def class_log_prob(self, x):
        features, logits = self.classifier(x)
        return {"linear": logits, "flow": self.flows[0](features)}

    def groups(self):
        """SGD for the classifier, AdamW for each flow, whose gradients are clipped to a norm of `clip`.

        As in the published code with compat="reference": the priors are not clipped, their gradients add up over the
        whole run (they are no parameters of the flow module there, and nothing clears them), and the flow has no
        average.
        """
        config = self.config
        recipe = {"optimizer": "adamw", "lr": config.flow_lr, "weight_decay": config.weight_decay}
        groups = super().groups()
        for flow in self.flows:
            prior = [p for p in flow.prior_parameters() if p.requires_grad]
            ids = {id(p) for p in prior}
            nets = [p for p in flow.parameters() if p.requires_grad and id(p) not in ids]
            if config.compat == "reference":
                groups.append({"params": nets, **recipe, "clip": config.clip, "average": False})
                groups.append({"params": prior, **recipe, "keep_gradients": True, "average": False})
            else:
                groups.append({"params": nets + prior, **recipe, "clip": config.clip})
        return groups

    def begin_step(self, step):
        if self.config.compat == "reference" and step >= 1024:
            # The published test() puts the flow into evaluation mode and nothing takes it out: dropout ends there.
            self.flows.eval()


def consensus(q, votes, detach=True):
    """q: (N_u, K), votes: logits (N_u, K) of the other voters -> weight (N_u,), pseudo-label (N_u,), agree (N_u,) bool.

    NCUE: weight_i = 1 where all voters choose the class that q chooses, else the smallest of their confidences. The
    published code lets the gradient of L_u through the weight into the flow (`detach=False`), which teaches the flow to
    be unsure where it disagrees; nothing in the paper asks for it.
    """
    lowest, pseudo_label = q.max(1)
    agree = torch.ones_like(pseudo_label, dtype=torch.bool)
    for logits in votes:
        confidence, choice = logits.softmax(1).max(1)
        agree = agree & (choice == pseudo_label)
        lowest = torch.minimum(lowest, confidence)
    weight = torch.where(agree, torch.ones_like(lowest), lowest)
    return (weight.detach() if detach else weight), pseudo_label, agree


def sampled_classifier(flow, z, noise=None):
    """z: (N, D) -> logits (N, K) of a linear classifier drawn from the flow's prior, the sampled third voter.

    Row k of its weight is pi_k m_k, with m_k ~ N(mu_k, sigma_k^2 I) drawn anew each call (`noise`: (K, D) standard
    normal). The prior gets no gradient from it.
    """
    with torch.no_grad():
        noise = torch.randn_like(flow.means) if noise is None else noise
        sample = flow.means + F.softplus(flow.rho)[:, None] * noise
        weight = flow.mixture_logits.softmax(0)[:, None] * sample
    return z @ weight.T
