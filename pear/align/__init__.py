"""Log-probs of the same bytes under two tokenizers: where tokens stand in a text, and the spans both share."""

from pear.align.merge import Alignment, align
from pear.align.roles import ROLES, Roles, read_roles
from pear.align.spans import Spans, Unaligned, spans_of, spans_of_text

__all__ = ["ROLES", "Alignment", "Roles", "Spans", "Unaligned", "align", "read_roles", "spans_of", "spans_of_text"]
