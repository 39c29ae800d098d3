"""What one must know of any Hugging Face model: its head, its layers, its adapters."""
