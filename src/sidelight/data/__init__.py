"""Texts with labels, from files, the Hugging Face hub or memory. Knows texts, not token ids."""
