"""Training runs on transformers.Trainer: the rows they see, how rows are built, and what they optimize."""
