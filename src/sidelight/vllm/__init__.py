"""Probes inside vLLM: the verdict comes from the forward pass that serves the request.

The flow, one file per step:

    entry      vLLM calls ``register`` in each of its processes
    surface    every name of vLLM's that is not documented; what is refused, and why
    settings   which probes, and the fingerprint of the model they were checked against
    params     a request says what each of its tokens belongs to
    taps       one opaque operation per decoder layer: the residual stream to a few columns
    columns    the columns of each token, kept at the token's KV slot
    tracking   scheduler: which requests can be judged after this step
    panel      columns and parts to verdicts
    judging    worker: reads the slots of those requests, judges them
    silent     a KV connector that stores nothing
    orphans    an engine whose parent is killed ends
    connector  carries what tracking says to the workers, and outcomes back
    scheduler  puts the outcome on the request's outputs
    control    loads other probes into running workers
    endpoint   a chat answer of vLLM's own server with the verdicts in it
    rewriting  the HTTP side of that

Training wants the hidden states themselves. Then these take the places of columns to scheduler:

    spool      a mapped file that becomes a shard of the activation cache
    capturing  which tokens of a step are kept, and the worker's copy of them
    capture_connector  carries the one to the other

All that is kept is kept by KV slot, never by request: a slot's columns are those of the token whose
keys and values it holds, whoever computed it. So chunked prefill, batching, preemption and shared
prefixes need no bookkeeping. ``docs/vllm.md`` says what is supported and which test shows it.
"""
