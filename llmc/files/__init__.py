"""File formats: those that llm.c reads and writes, the sets of files that make a checkpoint, Hugging Face's folders."""
