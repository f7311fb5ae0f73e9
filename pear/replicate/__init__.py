"""The experiment of the PEAR paper in miniature: several seeds, several ways of SFT, the same RL from each."""
