"""The model side: forward processes, step kernels, packed models, text and latent codecs, the sampling engine."""
