"""Text and tokens: tokeniser, chat template, incremental detokenisation, stop strings. No torch, no transformers."""
