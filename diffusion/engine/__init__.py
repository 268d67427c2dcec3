"""The sampling engine: requests in, finished trajectories out, batched between denoising steps."""
