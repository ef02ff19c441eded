"""Export to other runtimes, verified in each of them."""
