"""GGUF files of the Llama family: read as Hugging Face weights, and converted once to a safetensors folder."""
