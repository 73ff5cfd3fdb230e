"""The stages that tests stand on. All of it is real, and small.

``models``            tiny models and probes of random weights; tokenizers and chat templates
``data``              labelled texts with planted signals, files of rows, a package of guards
``servers``           commands, the engine and our server, in process or on loopback; clients
``vllm``              what vLLM serves, and its offline engine
``stock``             vLLM's own server as a process, and the ways to ask it
``pretended_device``  a device without a GPU; importing it registers a backend with PyTorch

Fixtures are in ``conftest.py``; laws that several test files run are in ``tests/*_contract.py``.
"""
