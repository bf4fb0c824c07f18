"""The legend: every letter that stands in a shape, and the types built from them.

    B   images in a batch                 h w   latent height and width (H / 8 and W / 8 with the usual VAE)
    H W image height and width, pixels    C     latent channels
    N   DiT tokens: (h / p) * (w / p)     M     CLIP patch tokens of the source
    D   DiT width                         E     width of the CLIP tokens
    P   width of the CLIP embedding       K     sampling steps
    p   patch size                        L     DiT blocks

Three words, three things: `source` is the given image, `target` the wanted one, `noise` the Gaussian start.
"""

from jaxtyping import Float, UInt8
from torch import Tensor

ImageU8 = UInt8[Tensor, "B 3 H W"]
"""RGB pixels, 0 to 255."""
Image = Float[Tensor, "B 3 H W"]
"""RGB pixels scaled to [-1, 1]."""
Latent = Float[Tensor, "B C h w"]
"""A VAE latent, standardised by channel to about unit variance."""
Time = Float[Tensor, "B"]
"""Flow time in [0, 1]: 0 is noise, 1 is the target image."""
ClipTokens = Float[Tensor, "B M E"]
ClipEmbedding = Float[Tensor, "B P"]
Tokens = Float[Tensor, "B N D"]
