"""PEAR's thin trainer on TRL and transformers: score -> sft -> eval. Tensor work is in `pear_kernels`."""
