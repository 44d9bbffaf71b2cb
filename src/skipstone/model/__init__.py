"""Floor 3: configuration, construction, the decoder and its Hugging Face model classes."""
