"""Programs for a checkout, each a readable script over `hf_segformer.training`; run them with `python -m`."""
