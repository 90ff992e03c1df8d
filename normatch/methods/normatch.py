"""NorMatch (Deng et al. 2024, TMLR, arXiv 2211.09593): a linear and a flow classifier vote on the pseudo-labels.

Every unlabelled image counts, without a confidence threshold: fully where the voters agree on its class, and where
they do not, by the confidence of the least confident voter.
"""

import torch
from torch import nn
from torch.nn import functional as F

from .. import distributed
from ..flows import FlowHead
from .metrics import average


class NorMatch(nn.Module):
    """features: (B + 2 N_u, D), logits: (B + 2 N_u, K), y: (B,), u_y: (N_u,) -> loss, metrics.

    Rows are the labelled images, the weak and the strong views of the unlabelled ones.

        L = L_x + lambda_u L_u + r (lambda_flow L_f + lambda_flow_unsup L_n)

    L_x: cross-entropy of the linear classifier on labelled images. L_u: weighted cross-entropy on strong views. L_f:
    cross-entropy of the flow's class posterior on labelled features. L_n: negative log-likelihood of unlabelled
    features under the flow. r rises from 0 to 1 over the first `warmup_flow` steps. The flow sees detached features
    and never strong views, so the backbone learns from L_x and L_u alone.

    u_y, the true labels where they are known and -1 where not, goes into the metrics only.
    """

    uses_unlabeled = True

    def __init__(self, features: int, classes: int, config):
        super().__init__()
        self.config = config
        heads = 2 if config.third_voter == "flow" else 1
        self.flows = nn.ModuleList(
            FlowHead(
                features,
                classes,
                config.couplings,
                config.hidden,
                config.dropout,
                trainable_prior=config.trainable_prior,
                compat=config.compat,
            )
            for _ in range(heads)
        )
        self.register_buffer("da_queue", torch.zeros(config.da_window, classes))

    def forward(self, features, logits, y, u_y, step):
        config = self.config
        n = len(u_y)
        reference = config.compat == "reference"
        logits_x, logits_weak, logits_strong = logits.split((len(y), n, n))

        # One pass of each flow over the labelled images and the weak views.
        outputs = [flow(features[: len(y) + n].detach()) for flow in self.flows]
        flow_logits_x = [out.class_log_prob[: len(y)] for out in outputs]
        votes = [out.class_log_prob[len(y) :] for out in outputs]
        if config.third_voter == "sampled":
            votes.append(sampled_classifier(self.flows[0], outputs[0].z[len(y) :]))

        q = (logits_weak.detach() / config.T).softmax(1)
        if config.dist_align:
            q, queue = align(q, self.da_queue)
            self.da_queue.copy_(queue)
        weight, pseudo_label, agree = consensus(q, votes, detach=not reference)

        loss_x = F.cross_entropy(logits_x, y)
        target = pseudo_label if config.one_hot else q
        loss_u = (F.cross_entropy(logits_strong, target, reduction="none") * weight).mean()
        loss_f = sum(F.cross_entropy(logits, y) for logits in flow_logits_x) / len(self.flows)
        loss_n = -outputs[0].log_prob[len(y) :].mean()
        r = ramp(step, config.warmup_flow, staircase=reference)
        loss = loss_x + config.lambda_u * loss_u + r * (config.lambda_flow * loss_f + config.lambda_flow_unsup * loss_n)

        confidence = q.amax(1)
        right, known = pseudo_label == u_y, u_y >= 0
        return loss, {
            "loss_x": average(loss_x),
            "loss_u": average(loss_u),
            "loss_flow": average(loss_f),
            "loss_flow_unsup": average(loss_n),
            "mask_ratio": average(weight),
            "consensus_ratio": average(agree),
            "high_confidence_ratio": average(confidence >= config.p_cutoff),
            "disagreement_weight": average(weight, ~agree),
            "confidence": average(confidence),
            "flow_confidence": average(votes[0].softmax(1).amax(1)),
            "pseudo_label_accuracy": average(right, known),
            "pseudo_label_accuracy_consensus": average(right, known & agree),
            "pseudo_label_accuracy_disagreement": average(right, known & ~agree),
            "pseudo_label_accuracy_high_confidence": average(right, known & (confidence >= config.p_cutoff)),
            "flow_pseudo_label_accuracy": average(votes[0].argmax(1) == u_y, known),
        }


def align(q, queue):
    """q: (N_u, K), queue: (W, K) batch means, oldest first -> aligned q (N_u, K), the queue with this batch's mean.

    Distribution alignment towards the uniform marginal: q_k is divided by the mean of class k over the last W
    batches, this one included, and renormalised. The sum does for the mean, whose factor cancels; rows not yet
    filled are zero. A class whose share underflows in all W batches is held at the smallest normal number.
    """
    queue = torch.cat((queue[1:], distributed.mean(q.mean(0, keepdim=True)).to(queue.dtype)))
    q = q / queue.sum(0).clamp_min(torch.finfo(queue.dtype).tiny)
    return q / q.sum(1, keepdim=True), queue


def consensus(q, votes, detach=True):
    """q: (N_u, K), votes: logits (N_u, K) of the other voters -> weight (N_u,), pseudo-label (N_u,), agree (N_u,) bool.

    weight_i = 1 where all voters choose the class that q chooses, else the smallest of their confidences.
    The published code lets the gradient of L_u through the weight into the flow (`detach=False`), which teaches the
    flow to be unsure where it disagrees; nothing in the paper asks for it.
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

    Row k of its weight is pi_k m_k, m_k ~ N(mu_k, sigma_k^2 I) drawn anew each call (`noise`: (K, D) standard normal).
    The prior gets no gradient from it.
    """
    with torch.no_grad():
        noise = torch.randn_like(flow.means) if noise is None else noise
        sample = flow.means + F.softplus(flow.rho)[:, None] * noise
        weight = flow.mixture_logits.softmax(0)[:, None] * sample
    return z @ weight.T


def ramp(step, warmup_flow, staircase=False):
    """The factor r in [0, 1] of the flow losses at `step` (0-based, int or tensor): linear over `warmup_flow` steps.

    The published code knows only epochs of 1,024 steps: `staircase` keeps r constant within each of them, so that
    the flow losses are off for the whole of the first.
    """
    if warmup_flow <= 0:
        return 1.0
    if staircase:
        step = step // 1024 * 1024
    progress = step / warmup_flow
    return progress.clamp(max=1.0) if isinstance(progress, torch.Tensor) else min(progress, 1.0)
