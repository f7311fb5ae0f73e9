"""The losses in models of transformers."""
