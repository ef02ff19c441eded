"""Publishing on the Hugging Face Hub: model card, push and Space."""
