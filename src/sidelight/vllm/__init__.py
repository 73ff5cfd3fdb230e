"""Probes inside vLLM: the verdict comes from the forward pass that serves the request.

vLLM calls ``install`` in each of its processes, and ``plugin`` puts our parts into it.
``internals`` has what we use of vLLM beyond its documentation, and ``settings`` says which probes
are served. In a worker, ``columns`` projects the residual stream of each layer and keeps the
columns of every token by KV slot, and ``worker`` judges.
``requests`` has what travels with a request, and the scheduler's side of it; ``connector`` puts
verdicts on vLLM's outputs, and ``outputs`` hears them. ``guard`` enforces the policy in vLLM's own
server: ``recogniser`` finds the turns of prompts, ``answers`` has what may be sent, ``endpoint``
adds to HTTP answers, and ``server`` starts it. ``engine`` judges texts and replaces the probes,
and ``lock`` lets requests and changes of them take turns. ``offline`` keeps hidden states for
training.
Everything is kept by KV slot, never by request. ``docs/vllm.md`` says what is supported.
"""


def install() -> None:
    """The entry point of ``vllm.general_plugins``.

    vLLM goes on without a plugin that it cannot import, and stops for one that fails later.
    """
    from sidelight.vllm.plugin import wrap_vllm

    wrap_vllm()
