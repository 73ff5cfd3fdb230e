"""LLM judges: what they are asked, how their answers are read, and the client that asks them."""
