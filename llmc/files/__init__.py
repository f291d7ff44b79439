"""Files of others: llm.c's .bin files, Hugging Face's folders."""
