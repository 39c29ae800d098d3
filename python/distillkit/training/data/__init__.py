"""The data of a training run: documents, examples, batches."""
