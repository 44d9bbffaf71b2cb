"""Floor 2: decoder parts with the parameter names of Hugging Face Llama. They do not depend on any mechanism."""
