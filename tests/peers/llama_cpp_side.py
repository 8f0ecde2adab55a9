"""Run with the Python of llama-cpp-python's environment: llama.cpp's logits with a control vector.

    python llama_cpp_side.py MODEL.gguf VECTORS.npy LOGITS.npy

VECTORS `[layers, d]` is what llama.cpp's common_control_vector_load_one makes of a file: its row N - 1 is direction.N.
"""

import ctypes
import sys

import numpy as np

ROW = [5, 80, 33, 12, 7, 61, 19, 20, 44, 3, 99, 15]


def main(model, vectors, output):
    import llama_cpp

    llama = llama_cpp.Llama(
        model,
        n_ctx=64,
        logits_all=True,
        verbose=False,
        n_threads=1,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        flash_attn=False,
    )
    data = np.ascontiguousarray(np.load(vectors), np.float32)
    failed = llama_cpp.llama_set_adapter_cvec(
        llama.ctx,
        data.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
        data.size,
        data.shape[1],
        1,
        llama_cpp.llama_model_n_layer(llama.model),
    )
    assert failed == 0
    llama.eval(ROW)
    np.save(output, np.array(llama.scores[: len(ROW)], np.float32))


if __name__ == "__main__":
    main(*sys.argv[1:])
