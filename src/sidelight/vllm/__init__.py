"""Probes inside vLLM: the verdict comes from the forward pass that serves the request.

vLLM calls ``patches.install`` in each of its processes. ``settings`` says which probes are served
and what a request's tokens belong to. In a worker, ``taps`` projects the residual stream of each
layer, ``columns`` keeps the columns of every token by KV slot, and ``worker`` judges. Beside the
scheduler, ``connector`` says what to read after each step and puts verdicts on vLLM's outputs.
``engine`` and ``requests`` make an ``Engine`` of it, ``exchange`` replaces its probes, ``guard``
and ``endpoint`` are for vLLM's own server, ``offline`` judges many texts, and ``capture`` keeps
hidden states for training.
Everything is kept by KV slot, never by request. ``docs/vllm.md`` says what is supported.
"""
