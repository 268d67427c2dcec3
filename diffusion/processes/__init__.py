"""Forward processes: how clean data is noised, and what a network prediction says about it. One class a process."""

from diffusion.processes.base import ForwardProcess, bcast, wide
from diffusion.processes.edm import EDM, karras_nodes
from diffusion.processes.rectified_flow import RectifiedFlow
from diffusion.processes.scheduler import process_from_scheduler
from diffusion.processes.variance_preserving import VariancePreserving

__all__ = ["EDM", "ForwardProcess", "RectifiedFlow", "VariancePreserving", "bcast", "karras_nodes", "process_from_scheduler", "wide"]
