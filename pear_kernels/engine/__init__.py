"""The walk over chunks of tokens and its schedule; the protocols of a head, a loss and a teacher."""
