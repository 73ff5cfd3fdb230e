"""From a conversation to token ids, and to what probes read of them. Knows no models or probes."""
