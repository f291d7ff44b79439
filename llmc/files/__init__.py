"""Files: what llm.c reads and writes, the sets of them that are a checkpoint, and Hugging Face's folders."""
