"""The llama.cpp engine: probes on the hidden states of GGUF files, on a CPU."""
