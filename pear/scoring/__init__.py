"""The parts of `pear score` (pear/score.py), a purpose each.

rows.py reads the data and decides, by choice.py, what becomes of each row; policies.py holds the models; batches.py
runs them; spans.py finds the bytes of each token; side.py keeps all that until `out` is written, by output.py;
processes.py knows the others that share the work.
"""
