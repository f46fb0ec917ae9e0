"""Triton kernels, one module per op; `launch(...)` and the like launch on the current stream.

Nothing here is imported before a Triton kernel runs: triton takes a second to load and exists on
Linux alone. With TRITON_INTERPRET=1 in the environment of the process, set before triton is first
imported, kernels run on CPU tensors in Triton's interpreter instead; such a process cannot compile.
"""

# Of every launch and every ahead-of-time compilation; said because Triton's default is to change.
OPTIONS = {"enable_fp_fusion": True}
