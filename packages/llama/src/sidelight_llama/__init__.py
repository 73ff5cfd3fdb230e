"""The llama.cpp engine: probes on the states of GGUF files, on a CPU."""
