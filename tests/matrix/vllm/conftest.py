from vllm_suite import (  # noqa: F401
    gemma,
    gemma_model,
    llama,
    llama_model,
    pytest_collection_modifyitems,
    subjects,
)
