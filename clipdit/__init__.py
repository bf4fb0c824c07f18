"""clipdit: image-to-image translation with diffusion transformers conditioned on CLIP (arXiv 2505.16001)."""
