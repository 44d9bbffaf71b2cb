"""Floor 2: plain decoder parts with the parameter names of Hugging Face Llama. They know no mechanism."""
