"""A GGUF file in llama.cpp: computes hidden states of all layers, and logits, from tokens.

A layer is the residual stream before a block: layer 0 follows the embedding. The output of the last
block is not included, because llama.cpp computes it only for tokens whose logits are requested.

llama.cpp aborts the process if its assumptions do not hold, so everything is checked first.
"""

import ctypes as c
import os
import signal
import weakref
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any

import numpy as np
from jaxtyping import Float32
from joblib import cpu_count

from sidelight.errors import SidelightError
from sidelight_llama.library import (
    BY_CALLBACK,
    BY_LAYER_INPUT,
    F16,
    F32,
    GET_LAYER_INPUT,
    LOAD_ALL,
    MOST_SEQUENCES,
    MOST_THREADS,
    SCALED_EMBEDDINGS,
    SET_LAYER_INPUT,
    Batch,
    EvalCallback,
    load_library,
    logged_error,
)

_LayerRows = Float32[np.ndarray, "token width"]
_Rows = Float32[np.ndarray, "layer token width"]
BATCH_TOKENS = 256
"""Maximum tokens per pass. llama.cpp stores the states of as many tokens in each layer."""
# llama.cpp rounds lengths up to a multiple of this.
_POSITIONS_STEP = 256


class LlamaModel:
    """The weights and the vocabulary of a GGUF file.

    Args:
        path: The file; its header has been checked.
        architecture: Its ``general.architecture``.

    Attributes:
        end_tokens: Ids that end a turn.

    Raises:
        SidelightError: llama.cpp cannot load the file.
    """

    def __init__(self, path: Path, architecture: str):
        if architecture not in BY_LAYER_INPUT | BY_CALLBACK:
            raise SidelightError(
                f"Hidden states of the architecture '{architecture}' cannot be read. Use another "
                "model."
            )
        self.architecture = architecture
        self.library = library = load_library()
        params = library.llama_model_default_params()
        params.n_gpu_layers = 0
        # A memory-mapped file could be overwritten, which would change the states.
        params.load_mode = params.lazy_mode = LOAD_ALL
        self.pointer: int | None = library.llama_model_load_from_file(os.fsencode(path), params)
        if not self.pointer:
            raise SidelightError(
                f"llama.cpp cannot load {path}: {logged_error()}. Check that the file is "
                "complete and that there is enough memory."
            )
        weakref.finalize(self, library.llama_model_free, self.pointer)
        self.width: int = library.llama_model_n_embd(self.pointer)
        self.layers: int = library.llama_model_n_layer(self.pointer)
        self._vocabulary = library.llama_model_get_vocab(self.pointer)
        self.vocabulary_size: int = library.llama_vocab_n_tokens(self._vocabulary)
        self.end_tokens = frozenset(
            token
            for token in range(self.vocabulary_size)
            if library.llama_vocab_is_eog(self._vocabulary, token)
        )

    def tokenize(self, text: str) -> list[int]:
        """Tokenize a text, treating names of control tokens as plain text."""
        data = text.encode()
        ids = np.empty(len(data) + 8, np.int32)
        count: int = self.library.llama_tokenize(
            self._vocabulary, data, len(data), ids.ctypes.data, len(ids), False, False
        )
        assert count >= 0
        return ids[:count].tolist()


class LlamaContext:
    """Keys and values of some sequences, each with its own positions.

    Sequences are independent, so states do not depend on other sequences. Keys and values are
    float16, or float32 with float32 weights.

    Args:
        model: The file.
        sequences: Number of sequences.
        positions: Maximum tokens per sequence.
        is_exact: Whether keys and values are float32.
        threads: Number of threads; None means one less than the number of cores, because another
            busy process on one core would stall all threads.

    Attributes:
        positions: Maximum tokens per sequence, possibly more than requested.

    Raises:
        SidelightError: There is not enough memory.
    """

    def __init__(
        self,
        model: LlamaModel,
        *,
        sequences: int = 1,
        positions: int,
        is_exact: bool = False,
        threads: int | None = None,
    ):
        assert 1 <= sequences <= MOST_SEQUENCES
        assert 1 <= (threads or 1) <= MOST_THREADS
        self.model, self.sequences = model, sequences
        self.positions = -(-positions // _POSITIONS_STEP) * _POSITIONS_STEP
        self._library = library = model.library
        params = library.llama_context_default_params()
        params.n_ctx, params.n_seq_max = sequences * self.positions, sequences
        # A pass is never split, so rows are in the order of its tokens.
        self._batch_tokens = max(BATCH_TOKENS, sequences)
        params.n_batch = params.n_ubatch = self._batch_tokens
        params.n_threads = params.n_threads_batch = threads or max(1, cpu_count() - 1)
        params.type_k = params.type_v = F32 if is_exact else F16
        # From 512 tokens on, flash attention would sum in an order that depends on threads and
        # other sequences. On a CPU, it is also slower per generated token.
        params.flash_attn_type = 0
        self._has_inputs = model.architecture in BY_LAYER_INPUT
        self._seen: list[list[_LayerRows]] = [[] for _ in range(model.layers)]
        if not self._has_inputs:
            self._callback = _observer(model, self._seen)
            params.cb_eval = c.cast(self._callback, c.c_void_p)
        self._pointer: int | None = library.llama_init_from_model(model.pointer, params)
        if not self._pointer:
            raise SidelightError(
                f"llama.cpp cannot allocate {sequences} texts of {self.positions} tokens: "
                f"{logged_error()}. Read or serve fewer or shorter texts at once."
            )
        weakref.finalize(self, library.llama_free, self._pointer)
        self._memory = library.llama_get_memory(self._pointer)
        if self._has_inputs:
            for layer in range(model.layers):
                getattr(library, SET_LAYER_INPUT)(self._pointer, layer, True)
        self._tokens = 0

    def forget(self, sequence: int, *, start: int = 0) -> None:
        """Free the positions of a sequence from ``start`` on."""
        is_forgotten = self._library.llama_memory_seq_rm(self._memory, sequence, start, -1)
        assert is_forgotten

    def decode(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        sequences: Sequence[int],
        *,
        outputs: Sequence[int] = (),
    ) -> None:
        """Run one pass over a part of one sequence, or over one token of each of several sequences.

        Args:
            tokens: Token ids.
            positions: Position of each token, continuing its sequence.
            sequences: Sequence of each token, ascending.
            outputs: Indices of tokens whose logits are needed.

        Raises:
            SidelightError: A token is not in the vocabulary, there is no room for it, or llama.cpp
                fails.
        """
        count, ids = len(tokens), np.array(tokens, np.int64)
        assert 0 < count <= self._batch_tokens
        assert count == len(positions) == len(sequences)
        assert [*sequences] == sorted(sequences)
        assert 0 <= sequences[0] <= sequences[-1] < self.sequences
        if not 0 <= ids.min() <= ids.max() < self.model.vocabulary_size:
            raise SidelightError(
                f"The tokenizer produced token id {ids.max()}, but the model's ids are below "
                f"{self.model.vocabulary_size}. Use the tokenizer that belongs to the file."
            )
        if max(positions) >= self.positions:
            raise SidelightError(
                f"A text has {max(positions) + 1} tokens, but there is room for only "
                f"{self.positions}. Shorten it."
            )
        for rows in self._seen:
            rows.clear()
        # The arrays must live until the call, which copies them, returns.
        token, pos, sequence = (
            np.array(values, np.int32) for values in (tokens, positions, sequences)
        )
        one, wanted = np.ones(count, np.int32), np.zeros(count, np.int8)
        places = sequence.ctypes.data + 4 * np.arange(count, dtype=np.uintp)
        wanted[[*outputs]] = 1
        addresses = (array.ctypes.data for array in (token, pos, one, places, wanted))
        batch = Batch(count, next(addresses), None, *addresses)
        with _interrupts_later():
            status: int = self._library.llama_decode(self._pointer, batch)
        if status:
            raise SidelightError(f"llama.cpp could not read {count} tokens: {logged_error()}.")
        self._tokens = count

    def rows(self) -> _Rows:
        """The hidden states of the latest pass's tokens, valid until the next pass."""
        layers, width = self.model.layers, self.model.width
        if self._has_inputs:
            get = getattr(self._library, GET_LAYER_INPUT)
            first, last = (get(self._pointer, layer) for layer in (0, layers - 1))
            # One array per call: layers are consecutive, with room for a full batch.
            size = layers * self._batch_tokens * width
            assert last - first == 4 * (size - self._batch_tokens * width)
            states = np.ctypeslib.as_array((c.c_float * size).from_address(first))
            return states.reshape(layers, self._batch_tokens, width)[:, : self._tokens]
        states = np.stack([np.concatenate(chunks) for chunks in self._seen])
        assert states.shape == (layers, self._tokens, width)
        return states

    def logits(self, index: int) -> Float32[np.ndarray, " vocabulary"]:
        """The logits after a token of the latest pass (-1 for the last), until the next pass."""
        address = self._library.llama_get_logits_ith(self._pointer, index)
        return np.ctypeslib.as_array(address, (self.model.vocabulary_size,))


@contextmanager
def _interrupts_later() -> Generator[None]:
    """Defer Ctrl-C until after the block, because ctypes drops exceptions in a callback."""
    stopped: list[int] = []
    is_main = current_thread() is main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, lambda number, _: stopped.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if stopped:
        raise KeyboardInterrupt


def _observer(model: LlamaModel, seen: list[list[_LayerRows]]) -> Any:
    """A callback that copies the input of each block into ``seen`` during computation.

    llama.cpp computes non-adjacent sequences separately, in ascending order.
    """
    library, width = model.library, model.width
    first = b"inp_scaled" if model.architecture in SCALED_EMBEDDINGS else b"embd"
    layers = {first: 0} | {b"l_out-%d" % (i - 1): i for i in range(1, model.layers)}

    def observe(tensor: int, is_asked: bool, _data: int | None) -> bool:
        layer = layers.get(library.ggml_get_name(tensor))
        if layer is None or is_asked:
            # Whether the tensor is needed; all others continue.
            return layer is not None or not is_asked
        size: int = library.ggml_nbytes(tensor)
        rows = np.empty((size // (4 * width), width), np.float32)
        library.ggml_backend_tensor_get(tensor, rows.ctypes.data, 0, rows.nbytes)
        seen[layer].append(rows)
        return True

    return EvalCallback(observe)
