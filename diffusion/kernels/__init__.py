"""Step kernels: one denoising step as a Gaussian with a mean and a scalar standard deviation. See `base`."""

from diffusion.kernels.base import Previous, StepKernel, ode_step
from diffusion.kernels.density import MIN_STD, log_prob
from diffusion.kernels.registry import make_kernel

__all__ = ["MIN_STD", "Previous", "StepKernel", "log_prob", "make_kernel", "ode_step"]
