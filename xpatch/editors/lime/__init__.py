"""LiME: language-anisotropic masks on the gradient an editor reads (Xu et al. 2023)."""
