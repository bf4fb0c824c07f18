"""Whether a variant is as good as the fp32 one, on the user's own images, and which variants are worth shipping."""
