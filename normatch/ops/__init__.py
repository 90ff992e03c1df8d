"""Fused ops of a normalizing-flow head: affine coupling, log-determinant, Gaussian-mixture log-likelihood, and others.

Each op is a kernel in `csrc/<op>.cpp` (and `.cu`), registered with PyTorch as `normatch::<op>`; its fake kernel, its
gradient and its public function are in the module here that bears its name. All of them are differentiable once (by
autograd; forward mode and the transforms of `torch.func` need `normatch.reference`), trace under
`torch.compile(fullgraph=True)`, and modify none of their arguments. Where no kernel is available (no extension,
another device), they call `normatch.reference`.

The public functions check their arguments first: they raise TypeError for one that is not a dense tensor (or a number)
or has a wrong dtype, ValueError for a wrong shape, mixed devices or a negative eps, and the message names it.

Inputs are float32, bfloat16, float16 or float64 (for gradient checks). Sums accumulate in float32, and
log-determinants and log-likelihoods are returned in float32, in nats; for float64 inputs all of it is float64.
"""

# The functions replace the submodules of the same name as attributes of this package.
from ._library import backend, build_info, kernels
from .affine_coupling import affine_coupling, affine_coupling_inverse
from .augment_views import augment_views
from .coupling2d import coupling2d, coupling2d_inverse
from .flow_head import flow_head, flow_head_path
from .gmm_log_prob import GmmPosterior, gmm_log_prob, gmm_posterior
from .logdet import logdet

__all__ = [
    "GmmPosterior", "affine_coupling", "affine_coupling_inverse", "augment_views", "backend", "build_info",
    "coupling2d", "coupling2d_inverse", "flow_head", "flow_head_path", "gmm_log_prob", "gmm_posterior", "kernels",
    "logdet",
]  # fmt: skip
