"""Labelled texts from files, the Hugging Face hub or memory. Works on texts, not token ids."""
