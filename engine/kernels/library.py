"""The C++ kernels through ctypes, which lets other Python threads run while a kernel computes (but not while it plans).

`AttentionStep` mirrors csrc/attention_types.h field by field; loading compares its size with the library's.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from native.compiler import NativeUnavailable
from native.library import open_library

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_I32, _I64, _F32, _PTR = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


def dtype_code(dtype: torch.dtype) -> int:
    """The kernels' number of a type. Raises ValueError for one they do not have."""
    if dtype not in _DTYPE_CODES:
        raise ValueError(f"the CPU kernels compute in {', '.join(map(str, _DTYPE_CODES))}, not in {dtype}")
    return _DTYPE_CODES[dtype]


class AttentionStep(ctypes.Structure):
    """pd::AttentionStep; what each field means is written there."""

    _fields_ = (
        ("dtype", _I32),
        ("num_threads", _I32),
        ("num_heads", _I32),
        ("num_kv_heads", _I32),
        ("head_dim", _I32),
        ("page_size", _I32),
        ("page_stride", _I64),
        ("layer_stride", _I64),
        ("scale", _F32),
        ("norm_eps", _F32),
        ("rope", _PTR),
        ("kv", _PTR),
        ("num_tokens", _I32),
        ("num_seqs", _I32),
        ("max_pages", _I32),
        ("num_items", _I32),
        ("num_merges", _I32),
        ("num_partials", _I32),
        ("positions", _PTR),
        ("slots", _PTR),
        ("query_start", _PTR),
        ("kv_lens", _PTR),
        ("page_table", _PTR),
        ("items", _PTR),
        ("merges", _PTR),
        ("item_capacity", _I32),
        ("block_tokens", _I32),
        ("partials", _PTR),
        ("scratch", _PTR),
    )


class PackedLinear(ctypes.Structure):
    """pd::PackedLinear in csrc/decoder_types.h."""

    _fields_ = (("packed", _PTR), ("bias", _PTR), ("outputs", _I64), ("inputs", _I64))


class DecoderLayer(ctypes.Structure):
    """pd::DecoderLayer."""

    _fields_ = (
        ("input_norm", _PTR),
        ("q_norm", _PTR),
        ("k_norm", _PTR),
        ("post_norm", _PTR),
        ("qkv", PackedLinear),
        ("output", PackedLinear),
        ("gate_up", PackedLinear),
        ("down", PackedLinear),
    )


class Decoder(ctypes.Structure):
    """pd::Decoder."""

    _fields_ = (
        ("num_layers", _I64),
        ("hidden_size", _I64),
        ("layers", _PTR),
        ("embedding", _PTR),
        ("norm", _PTR),
        ("head", PackedLinear),
        ("norm_eps", _F32),
    )


class DecoderBatch(ctypes.Structure):
    """pd::DecoderBatch."""

    _fields_ = (
        ("token_ids", _PTR),
        ("logit_rows", _PTR),
        ("num_rows", _I64),
        ("logits", _PTR),
        ("residual", _PTR),
        ("normed", _PTR),
        ("qkv", _PTR),
        ("attended", _PTR),
        ("activated", _PTR),
    )


_STRUCTS = (AttentionStep, PackedLinear, DecoderLayer, Decoder, DecoderBatch)


class Library:
    """The loaded functions with their argument types. Raises `NativeUnavailable` when it does not fit this code."""

    def __init__(self, path: Path) -> None:
        handle = open_library(path)
        self.add_rms_norm = handle.pd_add_rms_norm
        self.add_rms_norm.argtypes = (_I32, _PTR, _PTR, _PTR, _PTR, _I64, _I64, _F32, _I32)
        self.add_rms_norm.restype = None
        self.silu_mul = handle.pd_silu_mul
        self.silu_mul.argtypes = (_I32, _PTR, _PTR, _I64, _I64, _I32)
        self.silu_mul.restype = None
        self.block_tokens = handle.pd_block_tokens
        self.block_tokens.argtypes = (_I32,)
        self.block_tokens.restype = _I32
        self.scratch_bytes = handle.pd_scratch_bytes
        self.scratch_bytes.argtypes = (_I32, _I32, _I32)
        self.scratch_bytes.restype = _I64
        # Too short to let others run: a step would wait for the interpreter until they are done, which can take longer
        # than all that it does in Python itself.
        self.plan = ctypes.PYFUNCTYPE(_I32, _PTR)(("pd_plan", handle))
        self.attend = handle.pd_attend
        self.attend.argtypes = (_PTR, _I64, _PTR, _PTR, _PTR, _PTR)
        self.attend.restype = None
        self.packed_elements = handle.pd_packed_elements
        self.packed_elements.argtypes = (_I32, _I64, _I64, _I32)
        self.packed_elements.restype = _I64
        self.pack_linear = handle.pd_pack_linear
        self.pack_linear.argtypes = (_I32, _PTR, _I64, _I64, _I32, _PTR)
        self.pack_linear.restype = None
        self.forward = handle.pd_forward
        self.forward.argtypes = (_PTR, _PTR, _PTR)
        self.forward.restype = None
        handle.pd_struct_bytes.argtypes = (_I32,)
        handle.pd_struct_bytes.restype = _I64
        for index, struct in enumerate(_STRUCTS):
            theirs, ours = handle.pd_struct_bytes(index), ctypes.sizeof(struct)
            if theirs != ours:
                raise NativeUnavailable(f"{path} has a {struct.__name__} of {theirs} bytes, this code one of {ours}")
