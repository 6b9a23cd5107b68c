"""Language-anisotropic patch neurons: MPN's neurons behind one mask per language (LiME's idea, on neurons)."""
