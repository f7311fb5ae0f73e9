"""PEAR's thin trainer on TRL and transformers: score -> sft -> rl -> eval. Tensor work is in `pear_kernels`."""
