"""The engine's operations as Triton kernels: a fused product for the softmax, small kernels for rows and scans.

Nothing here is imported until a call runs on this backend, so that `pear_kernels` needs torch alone.
"""
