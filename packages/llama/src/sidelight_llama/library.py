"""ctypes bindings of llama.cpp: the functions, structures and architectures of one pinned build.

The package ``xllamacpp`` ships llama.cpp as a shared library, so no compiler is needed. Its headers
guarantee no stable layout, so any other version is refused, and this version is checked as far as
possible.
"""

import ctypes as c
import platform
from collections import deque
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sidelight.errors import SidelightError, how_to_install

PACKAGE = "xllamacpp"
PINNED = "2026.10.11549"

# In this build, the graphs of these architectures expose the input of each block; requesting it
# from another one aborts the process.
BY_LAYER_INPUT = frozenset({
    "gemma4", "gpt-oss", "llama", "minimax-m2", "qwen3", "qwen3moe",
})  # fmt: skip
# These name the output of each block "l_out" where it becomes the input of the next one.
BY_CALLBACK = frozenset({
    "apertus", "arcee", "baichuan", "bailingmoe2", "chatglm", "cohere2", "command-r", "deepseek",
    "deepseek2", "dots1", "ernie4_5", "ernie4_5-moe", "exaone", "exaone4", "falcon", "gemma",
    "gemma2", "gemma3", "glm4", "glm4moe", "gptneox", "granite", "hunyuan-moe", "internlm2",
    "llama4", "mistral3", "nemotron", "olmo", "olmo2", "olmoe", "orion", "phi2", "phi3", "qwen",
    "qwen2", "qwen2moe", "seed_oss", "smollm3", "stablelm", "starcoder2", "xverse",
})  # fmt: skip
# The first block of these reads embeddings that were multiplied by a number.
SCALED_EMBEDDINGS = frozenset({"gemma", "gemma2", "gemma3"})

MOST_SEQUENCES, MOST_THREADS = 256, 512
"""LLAMA_MAX_SEQ and GGML_MAX_N_THREADS in its headers."""
F32, F16 = 0, 1
"""The types of keys and values, as ggml numbers them."""
LOAD_ALL = 0
"""LLAMA_LOAD_MODE_NONE and LLAMA_LAZY_MODE_OFF."""

_pointer, _int, _unsigned, _bool, _float = c.c_void_p, c.c_int32, c.c_uint32, c.c_bool, c.c_float


class ModelParams(c.Structure):
    """``llama_model_params``."""

    _fields_ = (
        ("devices", _pointer), ("tensor_buft_overrides", _pointer), ("n_gpu_layers", _int),
        ("split_mode", _int), ("load_mode", _int), ("lazy_mode", _int), ("main_gpu", _int),
        ("tensor_split", _pointer), ("progress_callback", _pointer),
        ("progress_callback_user_data", _pointer), ("kv_overrides", _pointer),
        ("vocab_only", _bool), ("check_tensors", _bool), ("use_extra_bufts", _bool),
        ("no_host", _bool), ("no_alloc", _bool), ("load_mtp", _bool),
    )  # fmt: skip


class ContextParams(c.Structure):
    """``llama_context_params``."""

    _fields_ = (
        ("n_ctx", _unsigned), ("n_batch", _unsigned), ("n_ubatch", _unsigned),
        ("n_seq_max", _unsigned), ("n_rs_seq", _unsigned), ("n_outputs_max", _unsigned),
        ("n_outputs_max_per_seq", _unsigned), ("n_threads", _int), ("n_threads_batch", _int),
        ("ctx_type", _int), ("rope_scaling_type", _int), ("pooling_type", _int),
        ("attention_type", _int), ("flash_attn_type", _int), ("rope_freq_base", _float),
        ("rope_freq_scale", _float), ("yarn_ext_factor", _float), ("yarn_attn_factor", _float),
        ("yarn_beta_fast", _float), ("yarn_beta_slow", _float), ("yarn_orig_ctx", _unsigned),
        ("defrag_thold", _float), ("cb_eval", _pointer), ("cb_eval_user_data", _pointer),
        ("type_k", _int), ("type_v", _int), ("moe_cache_size", c.c_size_t),
        ("abort_callback", _pointer), ("abort_callback_data", _pointer), ("embeddings", _bool),
        ("offload_kqv", _bool), ("no_perf", _bool), ("op_offload", _bool), ("swa_full", _bool),
        ("kv_unified", _bool), ("samplers", _pointer), ("n_samplers", c.c_size_t),
        ("ctx_other", _pointer),
    )  # fmt: skip


class Batch(c.Structure):
    """``llama_batch``."""

    _fields_ = (
        ("n_tokens", _int), ("token", _pointer), ("embd", _pointer), ("pos", _pointer),
        ("n_seq_id", _pointer), ("seq_id", _pointer), ("logits", _pointer),
    )  # fmt: skip


EvalCallback = c.CFUNCTYPE(_bool, _pointer, _bool, _pointer)
"""Called with a tensor: whether it is wanted, and again when it has been computed."""
_LogCallback = c.CFUNCTYPE(None, _int, c.c_char_p, _pointer)

# The result and the arguments of each function. The last two are C++.
SET_LAYER_INPUT = "_Z30llama_set_embeddings_layer_inpP13llama_contextjb"
GET_LAYER_INPUT = "_Z30llama_get_embeddings_layer_inpP13llama_contextj"
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [_pointer, _pointer]),
    "llama_model_default_params": (ModelParams, []),
    "llama_context_default_params": (ContextParams, []),
    "llama_model_load_from_file": (_pointer, [c.c_char_p, ModelParams]),
    "llama_model_free": (None, [_pointer]),
    "llama_model_n_embd": (_int, [_pointer]),
    "llama_model_n_layer": (_int, [_pointer]),
    "llama_model_get_vocab": (_pointer, [_pointer]),
    "llama_vocab_n_tokens": (_int, [_pointer]),
    "llama_vocab_is_eog": (_bool, [_pointer, _int]),
    "llama_tokenize": (_int, [_pointer, c.c_char_p, _int, _pointer, _int, _bool, _bool]),
    "llama_init_from_model": (_pointer, [_pointer, ContextParams]),
    "llama_free": (None, [_pointer]),
    "llama_get_memory": (_pointer, [_pointer]),
    "llama_memory_seq_rm": (_bool, [_pointer, _int, _int, _int]),
    "llama_decode": (_int, [_pointer, Batch]),
    "llama_get_logits_ith": (c.POINTER(_float), [_pointer, _int]),
    "ggml_get_name": (c.c_char_p, [_pointer]),
    "ggml_nbytes": (c.c_size_t, [_pointer]),
    "ggml_backend_tensor_get": (None, [_pointer, _pointer, c.c_size_t, c.c_size_t]),
    SET_LAYER_INPUT: (None, [_pointer, _unsigned, _bool]),
    GET_LAYER_INPUT: (_pointer, [_pointer, _unsigned]),
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama_model_default_params": {
        "n_gpu_layers": -1, "split_mode": 1, "load_mode": -1, "lazy_mode": 1, "main_gpu": 0,
        "tensor_split": None, "kv_overrides": None, "vocab_only": False, "check_tensors": False,
        "use_extra_bufts": True, "no_alloc": False, "load_mtp": False,
    },
    "llama_context_default_params": {
        "n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "n_rs_seq": 0,
        "n_outputs_max": 0, "n_outputs_max_per_seq": 1, "pooling_type": -1, "attention_type": -1,
        "flash_attn_type": -1, "rope_freq_base": 0.0, "yarn_ext_factor": -1.0,
        "yarn_orig_ctx": 0, "defrag_thold": -1.0, "cb_eval": None, "type_k": F16, "type_v": F16,
        "moe_cache_size": 0, "abort_callback": None, "embeddings": False, "offload_kqv": True,
        "no_perf": True, "op_offload": True, "swa_full": True, "kv_unified": False,
        "samplers": None, "n_samplers": 0, "ctx_other": None,
    },
}  # fmt: skip

_errors: deque[str] = deque(maxlen=16)


@_LogCallback
def _log(level: int, text: bytes, _data: int | None) -> None:
    if level == 4:
        _errors.append(text.decode(errors="replace").strip())


@cache
def load_library() -> c.CDLL:
    """Load llama.cpp, and declare the functions used here.

    Raises:
        SidelightError: The library is not installed, has another version, or differs from its
            headers.
    """
    require_version()
    path = _path()
    library = c.CDLL(str(path))
    try:
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except AttributeError as error:
        raise _unexpected(f"has no function {error.args[0].rpartition(' ')[2]}") from error
    for name, defaults in _DEFAULTS.items():
        params = getattr(library, name)()
        for field, wanted in defaults.items():
            if (got := getattr(params, field)) != wanted:
                raise _unexpected(f"gives {got} for {field} by default instead of {wanted}")
        written, size = _written_bytes(path, name), c.sizeof(params)
        # The last bytes of a structure may be padding.
        if written is not None and not size - 8 < written <= size:
            raise _unexpected(f"writes {written} bytes in {name} instead of {size}")
    library.llama_log_set(c.cast(_log, _pointer), None)
    library.llama_backend_init()
    return library


def require_version() -> None:
    """Check that the package is installed in the version that this file describes.

    Raises:
        SidelightError: It is not.
    """
    try:
        installed = version(PACKAGE)
    except PackageNotFoundError as error:
        raise SidelightError(
            f"GGUF files need the package {PACKAGE} {PINNED}, which is not installed. "
            f"{how_to_install('./packages/llama')} There are wheels for Linux on x86-64 and "
            "arm64, and for macOS on arm64."
        ) from error
    if installed != PINNED:
        raise SidelightError(
            f"{PACKAGE} {installed} is installed, but Sidelight needs exactly {PINNED}: other "
            f"versions lay out their structures differently. Run: pip install {PACKAGE}=={PINNED}"
        )


def logged_error() -> str:
    """The first error that llama.cpp has logged since the last call; others follow from it."""
    first = _errors[0] if _errors else "no reason was given"
    _errors.clear()
    return first


def _path() -> Path:
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise _unexpected("cannot be imported")
    folder = Path(spec.origin).parent
    path = next(folder.glob(f"{PACKAGE}*.so"), None)
    if path is None:
        raise _unexpected(f"has no shared library in {folder}; Windows cannot run GGUF files")
    return path


def _written_bytes(path: Path, name: str) -> int | None:
    """Number of bytes written by a function that returns a structure; None if unknown on this CPU.

    The System V ABI of x86-64 passes the structure's address as the first argument.
    """
    if platform.machine() != "x86_64":
        return None
    # A second handle, with a different declaration of the function.
    function = c.CDLL(str(path))[name]
    function.restype, function.argtypes = _pointer, [_pointer]
    written = 0
    for filling in (0xA5, 0x5A):
        buffer = (c.c_ubyte * 1024)(*[filling] * 1024)
        function(c.addressof(buffer))
        written = max(written, *(i + 1 for i, byte in enumerate(buffer) if byte != filling))
    return written


def _unexpected(what: str) -> SidelightError:
    return SidelightError(
        f"The llama.cpp of {PACKAGE} {PINNED} {what}. Reinstall its wheel: pip install "
        f"--force-reinstall --no-deps {PACKAGE}=={PINNED}"
    )
