"""SegFormer from scratch, at home in Transformers."""
