"""Proofs of the safety controller: an independent judge of distance, attacks, and a baseline to compare with."""
