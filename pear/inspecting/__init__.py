"""`pear inspect`: what PEAR's weights will do to scored data, before any training.

data.py         the rows of the file as the student sees them
student.py      the student's log-probs on them
tokens.py       both as arrays, and the weights that pear_kernels gives
statistics.py   the numbers of one setting; weights by position; a grid of settings
suspicions.py   behaviour log-probs that look wrong
advice.py       all of it in words, with what each option would change
worst.py        which rows to look at
report.py       everything as one JSON value, which terminal.py and page.py show
"""

from pear.inspecting.inspect import inspect

__all__ = ["inspect"]
