"""Publishing on the Hugging Face Hub: model card, push, Space and example images."""
