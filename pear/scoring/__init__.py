"""The parts of `pear score` (pear/score.py), a purpose each.

rows.py reads the data and decides, by choice.py, what becomes of each row; policies.py holds the models; batches.py
runs them; side.py keeps what is scored until all is; processes.py knows the others that share the work; output.py
writes the rows.
"""
