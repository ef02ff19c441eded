"""Fine-tuning: recipes, Trainer, losses, checks and run records."""
