"""Images and masks: sources, readers, transforms and data sets."""
